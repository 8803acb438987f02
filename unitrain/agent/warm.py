"""The warm process: imports the framework once, then forks ranks that have it already, for one attempt after another.

`python -m unitrain.agent.warm TASK` is started by `starters.Warm`. It stays single-threaded and touches no device:
a fork copies one thread only, and no locks that others hold.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from .rank import die_with, run_entry, skip_teardown
from .signals import STOPPING, SignalPipe, signal_group
from .starters import fork_rank, reap, receive_start

_OWN_THREADS = Path("/proc/self/task")
_ORPHANED = signal.SIGRTMIN if hasattr(signal, "SIGRTMIN") else signal.SIGQUIT  # nobody else sends it


def main() -> None:
    """Import, fork on command, report every end, and leave when the agent is gone."""
    skip_teardown()
    task = json.loads(sys.argv[1])
    pids: dict[int, int] = {}

    own_pid = os.getpid()

    def end_with_agent(number: int, frame: object) -> NoReturn:
        if os.getpid() == own_pid:  # else a fork that has not become a rank yet
            _kill(pids)
        os._exit(0)

    # A terminal signals all processes of a job, and so does Slurm: the agent decides, and ranks note it themselves.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(_ORPHANED, end_with_agent)
    die_with(task["parent"], _ORPHANED)
    if _prepare(task) and serve(task, pids):
        run_entry(task["entry"], task["arguments"])
    sys.stderr.flush()
    os._exit(0)  # whatever threads the imports have started


def serve(task: dict[str, Any], pids: dict[int, int]) -> bool:
    """Fork ranks and report their ends until the agent is gone. True in a rank, which then goes its own way."""
    events, parent = task["events"], os.getpid()
    with SignalPipe((signal.SIGCHLD,)) as signals, socket.socket(fileno=task["commands"]) as commands:
        while True:
            readable, _, _ = select.select([commands.fileno(), signals.fd], [], [])
            signals.caught()
            for ended in reap(pids):
                _tell(events, rank=ended.rank, code=ended.code, at=ended.at)
            if commands.fileno() not in readable:
                continue
            start = receive_start(commands)
            if start is None:
                _kill(pids)
                return False
            pid = fork_rank(start, parent, [events])
            if pid == 0:
                return True
            pids[start.rank] = pid
            for fd in start.fds:
                os.close(fd)
            _tell(events, rank=start.rank, pid=pid)


def _prepare(task: dict[str, Any]) -> bool:
    """Import what the ranks need; False where a fork would not be safe."""
    gc.disable()  # imports make little garbage; looking for it takes a third of their time
    for module in task["preload"]:
        try:
            importlib.import_module(module)
        except Exception as error:
            traceback.print_exc()
            _tell(task["events"], refused=f"importing {module} failed: {type(error).__name__}: {error}")
            return False
    threads = len(list(_OWN_THREADS.iterdir())) if _OWN_THREADS.is_dir() else 0
    if threads != 1:
        found = f"the preloaded modules run {threads} threads" if threads else f"there is no {_OWN_THREADS}"
        _tell(task["events"], refused=found)
        return False
    gc.freeze()  # what is imported is never collected, so that its pages stay shared
    gc.enable()
    return True


def _tell(events: int, **event: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the agent is gone, which the loop is about to see
        os.write(events, json.dumps(event).encode() + b"\n")


def _kill(pids: dict[int, int]) -> None:
    for pid in pids.values():
        signal_group(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
