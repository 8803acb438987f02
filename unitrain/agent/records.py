"""The small files by which a run is found again from any shell: who runs it, how it ended, what happened."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

AGENT = "agent.json"  # the agent's process and those of its ranks
EXIT = "exit.json"  # how the last attempt ended
EVENTS = "events.jsonl"
_MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class Process:
    """A process that can be told from a later one of the same number."""

    pid: int
    host: str
    started: str  # clock ticks since boot, from the kernel; empty where the system does not tell

    def __post_init__(self) -> None:
        # `kill` takes 0 for a whole group, and -1 for every process that it may end.
        if type(self.pid) is not int or not 0 < self.pid < 1 << 31:
            raise ValueError(f"no process has the number {str(self.pid)[:40]!r}")
        if not isinstance(self.host, str) or not isinstance(self.started, str):
            raise ValueError("the host and the start of a process are words")

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process of that number on this host."""
        return cls(pid, hostname(), _start_ticks(pid))

    @property
    def here(self) -> bool:
        """True when it belongs to this host."""
        return self.host == hostname()

    @property
    def alive(self) -> bool:
        """True while it runs on this host; a zombie does not."""
        if not self.here:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        return self.started == _start_ticks(self.pid)


def hostname() -> str:
    """This machine's name, as in `hostname`."""
    return os.uname().nodename


def write_record(path: Path, **values: Any) -> None:
    """Replace a JSON file as a whole: a reader sees the old one or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(values) + "\n")
    beside.replace(path)


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON file's values; None where there is none. Raises UserError for anything but an object of moderate size."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, no object")
    except FileNotFoundError:
        return None
    except RecursionError as error:
        raise UserError(f"{path} cannot be used: it is nested too deep") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    return values


def write_agent(run_dir: Path, attempt: int, pids: dict[int, int], *, node: int = 0) -> None:
    """Say which processes run the attempt on this node: this one, and those of its ranks."""
    name = f"agent-{node}.json" if node else AGENT
    write_record(run_dir / name, process=asdict(Process.of(os.getpid())), attempt=attempt, ranks=pids)


def write_exit(run_dir: Path, exit_code: int, **facts: Any) -> None:
    """Say how the attempt ended."""
    write_record(run_dir / EXIT, exit_code=exit_code, time=time.time(), **facts)


def append_event(run_dir: Path, event: str, **facts: Any) -> None:
    """Add a line to the run's events, whole even when several processes write."""
    line = json.dumps({"time": time.time(), "event": event, **facts}) + "\n"
    fd = os.open(run_dir / EVENTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def _start_ticks(pid: int) -> str:
    try:
        # The command, in brackets, may hold spaces and brackets; state is field 3 and the start field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]
