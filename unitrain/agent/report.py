"""What is said of a run that failed: which rank failed first, why, and what to do next."""

from __future__ import annotations

import shlex
import signal
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ExitCode
from ..heartbeat import Phase
from .hang import Hang
from .logs import last_lines
from .records import EVENTS
from .screen import say
from .starters import Ended, describe_exit

_HEAD_START_SECONDS = 1.0
_LAST_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one rank failed."""

    rank: int
    at: float  # on the clock of time.monotonic(); only differences count
    host: str
    log: Path
    pid: int | None = None
    exit_code: int = ExitCode.FAILED
    how: str = ""  # after the rank's name: `was killed by SIGKILL`
    error: str = ""  # the exception's last line, or how it ended
    traceback: str = ""  # empty for an error that its message explains
    spoke: bool = True  # False: it ended without an exception of its own
    hung: bool = False
    stacks: Path | None = None  # what it was doing when it hung
    retry: bool = True  # False: it would fail in the same way again
    exception: Mapping[str, str] | None = None  # type and message
    account: Mapping[str, Any] | None = None  # where the rank's Trainer stood
    step: int | None = None  # in which it hung, from 1

    @classmethod
    def from_message(cls, message: dict[str, Any], log: Path) -> Failure:
        """A rank's own account, as the worker tells it."""
        expected = not message["traceback"]
        return cls(
            rank=message["rank"],
            at=message["monotonic"],
            host=message["host"],
            log=log,
            pid=message["pid"],
            exit_code=message["exit_code"],
            how=f"raised {message['type']}",
            error=message["message"] if expected else f"{message['type']}: {message['message']}".removesuffix(": "),
            traceback=message["traceback"],
            retry=message.get("retry") is not False,
            exception={"type": message["type"], "message": message["message"]},
            account=account if isinstance(account := message.get("account"), dict) else None,
        )

    @classmethod
    def from_end(cls, ended: Ended, *, host: str, log: Path, pid: int | None) -> Failure:
        """A rank that ended without a word.

        Its peers may notice closed sockets and raise before its parent learns of its death, so it gets a head start;
        but not for SIGABRT, by which libraries end a process whose peer is gone.
        """
        how = describe_exit(ended.code)
        why = ended.cause or _hint(ended.code)
        return cls(
            rank=ended.rank,
            at=ended.at - (0 if ended.code == -signal.SIGABRT else _HEAD_START_SECONDS),
            host=host,
            log=log,
            pid=pid,
            exit_code=ended.code,
            how=how,
            error=f"rank {ended.rank} {how}{': ' if why else ''}{why}",
            spoke=False,
        )

    @classmethod
    def from_lost_node(cls, node: int, host: str, why: str, *, rank: int, log: Path) -> Failure:
        """A whole node from which nothing comes any more; `rank` is the first of its ranks."""
        name = f"node {node} ({host})" if host else f"node {node}"
        return cls(
            rank=rank,
            at=time.monotonic() - _HEAD_START_SECONDS,
            host=host or f"node {node}",
            log=log,
            exit_code=-signal.SIGKILL,
            how=f"is lost with {name}: {why}",
            error=f"{name} is lost: {why}",
            spoke=False,
        )

    @classmethod
    def from_hang(cls, hang: Hang, *, host: str, log: Path, pid: int, stacks: Path) -> Failure:
        """A rank that got on no more."""
        return cls(
            rank=hang.rank,
            at=0,  # nothing failed before it
            host=host,
            log=log,
            pid=pid,
            how=f"hangs: it {hang}",
            error=f"rank {hang.rank} hangs: it {hang}",
            spoke=False,
            hung=True,
            step=hang.step + (hang.phase == Phase.STEP),
            stacks=stacks if stacks.exists() and stacks.stat().st_size else None,
        )

    def sent(self, run_dir: Path) -> dict[str, Any]:
        """As one agent tells it to another, which has another clock and maybe another path to the run's folder."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        paths = {name: str(path.relative_to(run_dir)) for name in ("log", "stacks") if (path := values[name])}
        del values["at"]
        return {**values, "stacks": None, **paths, "exit_code": int(self.exit_code), "age": time.monotonic() - self.at}

    @classmethod
    def received(cls, message: Mapping[str, Any], run_dir: Path) -> Failure:
        """What another agent has `sent`."""
        values = dict(message)
        at = time.monotonic() - values.pop("age")
        paths = {name: run_dir / values.pop(name) for name in ("log", "stacks") if values[name]}
        return cls(**{**values, **paths}, at=at)


def keep_capsule(failure: Failure, run_dir: Path, environ: Mapping[str, str], **facts: Any) -> Path | None:
    """The failure's own folder; None where the disk does not take it, which is said."""
    from ..capsule import write_capsule  # here: seldom needed, and not light

    attempt = failure.log.parent
    try:
        return write_capsule(
            run_dir,
            environ,
            account=failure.account,
            rank=failure.rank,
            host=failure.host,
            how="hang" if failure.hung else "exception" if failure.spoke else "end",
            error=failure.error,
            exception=failure.exception,
            traceback=failure.traceback,
            exit_code=int(failure.exit_code),
            stacks=sorted(str(path.relative_to(run_dir)) for path in attempt.glob("stacks-rank-*.txt")),
            log=str(failure.log) if failure.log.is_file() else None,
            last_lines=last_lines(failure.log, _LAST_LINES),
            **facts,
        )
    except (OSError, ValueError) as error:
        say(f"note: the failure could not be kept in {run_dir}: {error}")
        return None


def first_failure(failures: Iterable[Failure]) -> Failure:
    """The one that made the others fail."""
    return min(failures, key=lambda failure: failure.at)


def failure_exit_code(failure: Failure) -> ExitCode:
    """What the run ends with: a wrong request stays one, everything else is a failure."""
    return ExitCode.BAD_RECIPE if failure.exit_code == ExitCode.BAD_RECIPE else ExitCode.FAILED


def failure_block(failure: Failure, run_dir: Path, *, log_shown: bool, capsule: Path | None = None) -> str:
    """The last words of a failed run. The first failing rank's own exception is the last of them."""
    process = f"pid {failure.pid}, {failure.host}" if failure.pid else failure.host
    lines = [
        f"rank {failure.rank} {failure.how} ({process})",
        f"  its log: {_near(failure.log)}",
        f"  {next_command(run_dir)}",
    ]
    if failure.stacks is not None:
        lines.append(f"  the stacks of all ranks: {_near(failure.stacks.parent)}/stacks-rank-*.txt")
    if capsule is not None:
        lines.append(f"  all that is known of it: {_near(capsule)}; to see it again: unitrain repro {_near(capsule)}")
    if not failure.spoke and not log_shown:
        lines += ["  its last lines:", *(f"    {line}" for line in last_lines(failure.log, _LAST_LINES))]
    lines.append(failure.traceback.rstrip() or failure.error)
    return "\n".join(lines)


def restart_words(failure: Failure, restart: int, step: int, after_seconds: float) -> str:
    """One line for a run that goes on by itself."""
    if failure.spoke:
        error = failure.error.splitlines()[0] if failure.error else ""
        what = f"rank {failure.rank} {failure.how} (its log: {_near(failure.log)}): {error}"
    else:
        what = f"{failure.error} (its log: {_near(failure.log)})"
    wait = f" in {after_seconds:g} s" if after_seconds else ""
    whence = f"from step {step}" if step else "from the beginning"
    return f"{what}; restart {restart}{wait}, {whence}"


def loop_words(faults: Counter[tuple[int, str]]) -> str:
    """Why a run is not started again though it might be."""
    lines = [f"crash loop: {faults.total()} attempts in a row failed without a newer checkpoint"]
    for (rank, error), count in faults.most_common():
        first = error.splitlines()[0] if error else ""
        lines.append(f"  {count} x rank {rank}: {first}")
    return "\n".join(lines)


def next_command(run_dir: Path) -> str:
    """The command that goes on from the last checkpoint, or the one that starts over."""
    if _has_checkpoint(run_dir):
        return f"to continue from its last checkpoint: unitrain resume {shlex.quote(_near(run_dir))}"
    return f"it has no checkpoint yet; to start over: unitrain launch {shlex.quote(_near(run_dir / 'recipe.yaml'))}"


def _near(path: Path) -> str:
    """The path as one would type it here."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else path)


def _has_checkpoint(run_dir: Path) -> bool:
    if any((run_dir / "checkpoints").glob("*/MANIFEST.json")):
        return True
    try:  # they may be anywhere, but the run tells when it has written one
        with (run_dir / EVENTS).open() as events:
            return any('"event": "checkpoint"' in line for line in events)
    except FileNotFoundError:
        return False


def _hint(code: int) -> str:
    if code == -signal.SIGKILL:
        return "if nobody did that by hand, the machine was out of memory (`dmesg` tells)"
    return ""
