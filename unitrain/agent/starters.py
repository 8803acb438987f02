"""How ranks come to life: as new processes, or as forks of a process that has imported the framework already."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from .rank import RankStart, become_rank

_COMMAND_BYTES = 1 << 17


@dataclass(frozen=True)
class Started:
    """A rank has become a process."""

    rank: int
    pid: int


@dataclass(frozen=True)
class Ended:
    """A rank's process is gone."""

    rank: int
    code: int  # negative: the signal that killed it
    at: float  # time.monotonic()
    cause: str = ""  # what ended it, where that was not the rank itself


class CannotFork(Exception):
    """Forking would not be safe; no rank has been started."""


class Starter(ABC):
    """Starts the ranks of one node, for one attempt after another, and tells what becomes of them."""

    wake_fd: int | None = None  # becomes readable when there is news; None: SIGCHLD tells

    @abstractmethod
    def start(self, starts: Sequence[RankStart]) -> None:
        """Begin to start ranks, when those of the attempt before have ended; `news` tells when they are there."""

    @abstractmethod
    def news(self) -> list[Started | Ended]:
        """What has happened since the last call. Raises CannotFork."""

    def close(self) -> None:
        """Give up what the starter holds; called when every rank has ended."""
        return


class FirstSafe(Starter):
    """The first of several starters that does not refuse."""

    def __init__(self, starters: Sequence[Starter], refused: Callable[[CannotFork], None]) -> None:
        self._starter, *self._others = starters
        self._refused = refused
        self._starts: Sequence[RankStart] = ()

    @property
    def wake_fd(self) -> int | None:  # type: ignore[override]  # another one after a refusal
        """That of the starter in use."""
        return self._starter.wake_fd

    def start(self, starts: Sequence[RankStart]) -> None:
        """See Starter."""
        self._starts = starts
        self._starter.start(starts)

    def news(self) -> list[Started | Ended]:
        """See Starter; a refusal is told, and the next starter begins."""
        try:
            return self._starter.news()
        except CannotFork as refusal:
            if not self._others:
                raise
            self._refused(refusal)
            self._starter.close()
            self._starter = self._others.pop(0)
            self._starter.start(self._starts)
            return []

    def close(self) -> None:
        """See Starter."""
        self._starter.close()


class Spawn(Starter):
    """Every rank is a new Python process."""

    def __init__(self, entry: str, arguments: Sequence[str], defaults: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", "unitrain.agent.rank", str(os.getpid()), entry, *arguments]
        self._defaults = defaults
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._news: list[Started | Ended] = []

    def start(self, starts: Sequence[RankStart]) -> None:
        """Start them all now."""
        for start in starts:
            with open(start.log, "ab") as log:
                process = subprocess.Popen(
                    self._command,
                    env={**self._defaults, **os.environ, **start.variables},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=start.fds,
                )
            self._processes[start.rank] = process
            self._news.append(Started(start.rank, process.pid))

    def news(self) -> list[Started | Ended]:
        """Starts and ends, in that order."""
        for rank, process in list(self._processes.items()):
            code = process.poll()
            if code is not None:
                del self._processes[rank]
                self._news.append(Ended(rank, code, time.monotonic()))
        news, self._news = self._news, []
        return news


class Warm(Starter):
    """Ranks are forked from one process that imports the framework once (see `warm.py`)."""

    def __init__(
        self, preload: Sequence[str], entry: str, arguments: Sequence[str], defaults: Mapping[str, str], log: Path
    ) -> None:
        self._preload, self._entry, self._arguments = preload, entry, arguments
        self._defaults = defaults
        self._log = log
        self._alive: dict[int, int | None] = {}  # rank -> pid, once known
        self._rest = b""
        self._lost = False  # the warm process is gone

    def start(self, starts: Sequence[RankStart]) -> None:
        """Have the warm process fork the ranks when its imports are done; it is started where there is none yet."""
        if self._lost:
            self.close()
        if self.wake_fd is None:
            self._launch()
        self._alive = {start.rank: None for start in starts}
        try:
            for start in starts:
                send_start(self._commands, start)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has just ended: `news` tells

    def _launch(self) -> None:
        self._commands, commands = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wake_fd, events = os.pipe()
        os.set_blocking(self.wake_fd, False)
        task = {
            "parent": os.getpid(),
            "commands": commands.fileno(),
            "events": events,
            "preload": self._preload,
            "entry": self._entry,
            "arguments": self._arguments,
        }
        with self._log.open("ab") as log, commands:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "unitrain.agent.warm", json.dumps(task)],
                env={**self._defaults, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[commands.fileno(), events],
            )
        os.close(events)
        self._rest, self._lost = b"", False

    def news(self) -> list[Started | Ended]:
        """What the warm process reports; when it is gone, so are its ranks."""
        assert self.wake_fd is not None, "started before"
        news: list[Started | Ended] = []
        while not self._lost:
            try:
                chunk = os.read(self.wake_fd, 65536)
            except BlockingIOError:
                break
            self._lost = not chunk
            self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            event = json.loads(line)
            if "refused" in event:
                raise CannotFork(event["refused"])
            if "pid" in event:
                self._alive[event["rank"]] = event["pid"]
                news.append(Started(**event))
            else:
                del self._alive[event["rank"]]
                news.append(Ended(**event))
        if self._lost and self._alive:
            news += self._ended_with_it()
        return news

    def _ended_with_it(self) -> list[Started | Ended]:
        """The kernel kills the ranks of a warm process that is gone: they are as good as ended."""
        code = self._process.wait()
        cause = f"the process that forked it (pid {self._process.pid}) {describe_exit(code)}; see {self._log}"
        if all(pid is None for pid in self._alive.values()):
            raise CannotFork(f"the warm process {describe_exit(code)} before it had forked a rank; see {self._log}")
        for pid in self._alive.values():
            if pid is not None:
                _await_end(pid)  # a new attempt must find none of the old one
        lost = [Ended(rank, -signal.SIGKILL, time.monotonic(), cause) for rank in self._alive]
        self._alive.clear()
        return [*lost]

    def close(self) -> None:
        """End the warm process: it leaves when nobody can command it any more."""
        if self.wake_fd is None:
            return  # it was never started
        self._commands.close()
        self._process.wait()
        os.close(self.wake_fd)
        self.wake_fd = None


class Forks(Starter):
    """Ranks are forks of this very process and run a function of it: for what no other process could import."""

    def __init__(self, run: Callable[[], int]) -> None:
        self._run = run
        self._pids: dict[int, int] = {}
        self._news: list[Started | Ended] = []

    def start(self, starts: Sequence[RankStart]) -> None:
        """Fork them all now."""
        parent = os.getpid()
        for start in starts:
            pid = fork_rank(start, parent, [other.agent_fd for other in starts if other != start])
            if pid == 0:
                self._be_rank()
            self._pids[start.rank] = pid
            self._news.append(Started(start.rank, pid))

    def _be_rank(self) -> NoReturn:
        """Run the function; never return into the loop of the process that was copied."""
        code = 1
        try:
            code = self._run()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def news(self) -> list[Started | Ended]:
        """Starts and ends, in that order."""
        news, self._news = [*self._news, *reap(self._pids)], []
        return news


def send_start(commands: socket.socket, start: RankStart) -> None:
    """Send a rank's place and its descriptors to another process."""
    socket.send_fds(commands, [json.dumps(asdict(start)).encode()], start.fds)


def receive_start(commands: socket.socket) -> RankStart | None:
    """What `send_start` has sent, with the descriptors as they are here; None when the sender is gone."""
    data, fds, _, _ = socket.recv_fds(commands, _COMMAND_BYTES, 3, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    agent_fd, heartbeat_fd, memory_fd = fds
    return replace(RankStart(**json.loads(data)), agent_fd=agent_fd, heartbeat_fd=heartbeat_fd, memory_fd=memory_fd)


def fork_rank(start: RankStart, parent: int, others: Sequence[int]) -> int:
    """Fork a rank; 0 in the rank itself, its pid in the parent."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads; a warm process has none, and a notebook's user chose to fork it.
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        become_rank(start, parent=parent, others=others)
    return pid


def reap(pids: dict[int, int]) -> list[Ended]:
    """The forked ranks that have ended; they are taken out of `pids` (rank -> pid)."""
    ended = []
    for rank, pid in list(pids.items()):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            del pids[rank]
            ended.append(Ended(rank, os.waitstatus_to_exitcode(status), time.monotonic()))
    return ended


def _await_end(pid: int) -> None:
    """Until a process that is no child of ours is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([fd], [], [])
    os.close(fd)


def describe_exit(code: int) -> str:
    """How a process ended, after its name: `ended with exit code 3`, `was killed by SIGKILL`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"
