"""How a process becomes a rank: its place, its log, its way to the agent; and how it leaves.

`python -m unitrain.agent.rank PARENT_PID MODULE:FUNCTION ARGUMENTS` is a rank that was started as a new process.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TextIO

from .signals import STOPPING

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class RankStart:
    """All that makes a process a certain rank."""

    rank: int
    environ: Mapping[str, str]
    log: str
    agent_fd: int  # the rank's end of its pipe to the agent
    heartbeat_fd: int  # memory that the agent reads (see `heartbeat`)
    slot: int  # the rank's place in it
    memory_fd: int = -1  # memory for snapshots, which outlives the rank (see `checkpoint.memory`); -1: none

    @property
    def variables(self) -> dict[str, str]:
        """Its environment, with the descriptors as they are in this process."""
        own = {
            "UNITRAIN_AGENT_FD": str(self.agent_fd),
            "UNITRAIN_HEARTBEAT": f"{self.heartbeat_fd}:{self.slot}",
            "UNITRAIN_MEMORY": str(self.memory_fd),
        }
        return {**self.environ, **own}

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors that it takes along."""
        return self.agent_fd, self.heartbeat_fd, self.memory_fd


def become_rank(start: RankStart, *, parent: int, others: Iterable[int]) -> None:
    """Turn this freshly forked process into a rank; `others` are descriptors of its parent that it must not hold."""
    os.setsid()
    die_with(parent, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for number in (*STOPPING, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for fd in others:
        os.close(fd)
    _redirect(start.log)
    os.environ.update(start.variables)
    for fd in start.fds:
        os.set_inheritable(fd, False)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def run_entry(entry: str, arguments: list[str]) -> NoReturn:
    """Call `module:function` with the arguments and leave with the exit code that it returns."""
    module, _, function = entry.partition(":")
    sys.argv = [entry, *arguments]
    main: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    leave(main(arguments))


def leave(code: int) -> NoReturn:
    """End this process. After a failure at once: threads that wait for other ranks would hold it for ever."""
    if code == 0:
        _done.append(True)
        sys.exit(0)
    _exit_now(code)


def skip_teardown() -> None:
    """Call this first in a process that will `leave`: threads and exit functions will still end in good order.

    But freeing every object of a large framework takes a second of CPU time, and the kernel does it at once.
    """
    atexit.register(lambda: _exit_now(0) if _done else None)  # registered first, so called last


_done: list[bool] = []


def _exit_now(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def die_with(parent: int, number: int) -> None:
    """Have the kernel send this signal when the parent dies, so that nothing outlives it."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), number)


def write_to(log: str) -> None:
    """Send stdout and stderr of this process, Python's and C's, to the end of a log file."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def line_buffered(fd: int) -> TextIO:
    """A text stream on a descriptor that writes each line as it ends."""
    return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def _redirect(log: str) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    write_to(log)
    # New objects, because a notebook's are not on these descriptors.
    sys.stdout, sys.stderr = line_buffered(1), line_buffered(2)


def main() -> NoReturn:
    """Run an entry as the rank that the environment describes."""
    skip_teardown()
    parent, entry, *arguments = sys.argv[1:]
    die_with(int(parent), signal.SIGKILL)
    sys.stdout = line_buffered(1)
    run_entry(entry, arguments)


if __name__ == "__main__":
    main()
