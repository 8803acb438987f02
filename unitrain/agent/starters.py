"""How ranks come to life: as new processes, or as forks of a process that has imported the framework already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from .rank import RankStart, become_rank


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
    """Starts the ranks of one node and tells what becomes of them."""

    wake_fd: int | None = None  # becomes readable when there is news; None: SIGCHLD tells

    @abstractmethod
    def start(self, starts: Sequence[RankStart]) -> None:
        """Begin to start ranks; `news` tells when they are there."""

    @abstractmethod
    def news(self) -> list[Started | Ended]:
        """What has happened since the last call. Raises CannotFork."""

    def close(self) -> None:
        """Give up what the starter holds; called when every rank has ended."""
        return


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
                    env={**self._defaults, **os.environ, **start.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=[start.agent_fd],
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

    def start(self, starts: Sequence[RankStart]) -> None:
        """Start the warm process; it forks the ranks when its imports are done."""
        commands, self._commands = os.pipe()
        self.wake_fd, events = os.pipe()
        os.set_blocking(self.wake_fd, False)
        task = {
            "parent": os.getpid(),
            "commands": commands,
            "events": events,
            "preload": self._preload,
            "entry": self._entry,
            "arguments": self._arguments,
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "unitrain.agent.warm", json.dumps(task)],
                env={**self._defaults, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[commands, events, *(start.agent_fd for start in starts)],
            )
        os.close(commands)
        os.close(events)
        self._alive = {start.rank: None for start in starts}
        os.write(self._commands, json.dumps([asdict(start) for start in starts]).encode() + b"\n")

    def news(self) -> list[Started | Ended]:
        """What the warm process reports; when it is gone, so are its ranks."""
        assert self.wake_fd is not None, "started before"
        news: list[Started | Ended] = []
        gone = False
        while not gone:
            try:
                chunk = os.read(self.wake_fd, 65536)
            except BlockingIOError:
                break
            gone = not chunk
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
        if gone and self._alive:
            news += self._lost()
        return news

    def _lost(self) -> list[Started | Ended]:
        """The kernel kills the ranks of a warm process that is gone: they are as good as ended."""
        code = self._process.wait()
        cause = f"the process that forked it (pid {self._process.pid}) {describe_exit(code)}; see {self._log}"
        if all(pid is None for pid in self._alive.values()):
            raise CannotFork(f"the warm process {describe_exit(code)} before it had forked a rank; see {self._log}")
        lost = [Ended(rank, -signal.SIGKILL, time.monotonic(), cause) for rank in self._alive]
        self._alive.clear()
        return [*lost]

    def close(self) -> None:
        """End the warm process: it leaves when nobody can command it any more."""
        if self.wake_fd is None:
            return  # it was never started
        os.close(self._commands)
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


def describe_exit(code: int) -> str:
    """How a process ended, after its name: `ended with exit code 3`, `was killed by SIGKILL`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"
