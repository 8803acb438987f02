"""How one waits for actors: never without a limit, and whoever is late or dead is named with what it last said."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..agent.records import hostname
from ..errors import UnitrainError

SETTLE_SECONDS = 2.0  # that an actor which has died has to be known as dead, when another one fails because of it
_MEANWHILE_SECONDS = 0.5
_LOOK_SECONDS = 5.0  # for what is read on another node
_STACK_SECONDS = 2.0
_NUM_LINES, _NUM_BYTES = 12, 16384
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_STATES = {"T": "is stopped (SIGSTOP?)", "t": "is stopped by a debugger", "D": "waits in the kernel", "Z": "has ended"}


@dataclass(frozen=True)
class Waited:
    """An actor as people find it."""

    name: str
    host: str = ""
    pid: int = 0
    node: str = ""  # Ray's number of its node
    logs: tuple[str, ...] = ()  # files that its output goes to, on its node
    stacks: str = ""  # file into which it writes its stacks at SIGQUIT

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid} on {self.host})" if self.pid else self.name


class ActorFailed(UnitrainError):
    """An actor that cannot go on; the same work may succeed on another one."""

    def __init__(self, message: str, name: str = "", host: str = "", pid: int = 0) -> None:
        super().__init__(message)
        self.name, self.host, self.pid = name, host, pid


class ActorLost(ActorFailed):
    """Its process, or its node, is no more."""


class ActorSilent(ActorFailed):
    """It did not answer in time."""


def wait(
    refs: Sequence[Any],
    *,
    names: Sequence[str | Waited],
    seconds: float,
    what: str,
    meanwhile: Callable[[], None] | None = None,
) -> list[Any]:
    """The results of these calls, one to each of the named actors, in order.

    `meanwhile` is called about once a second while there is none; what it raises ends the waiting. Raises ActorLost
    where an actor has died, ActorSilent with its stack where `seconds` are over, and the call's own error where it
    failed: of several, the first.
    """
    waited = [Waited(name) if isinstance(name, str) else name for name in names]
    assert len(waited) == len(refs), "one name for each call"
    deadline = time.monotonic() + seconds
    pending = {ref: number for number, ref in enumerate(refs)}
    results: dict[int, Any] = {}
    failed: BaseException | None = None
    while pending:
        remaining = deadline - time.monotonic()
        pause = remaining if meanwhile is None else min(remaining, _MEANWHILE_SECONDS)
        done, _ = ray.wait(list(pending), num_returns=1, timeout=max(pause, 0))
        if not done:
            if meanwhile is None or remaining <= 0:
                break
            if failed is None:
                meanwhile()
        for ref in done:
            number = pending.pop(ref)
            try:
                results[number] = ray.get(ref, timeout=max(deadline - time.monotonic(), _LOOK_SECONDS))
            except RayActorError as error:
                raise _lost(waited[number], what, error) from error
            except RayTaskError as error:
                if failed is None:  # others may fail because of one that has died, which is heard of a little later
                    failed, deadline = as_raised(error, waited[number]), time.monotonic() + SETTLE_SECONDS
            except GetTimeoutError:
                pending[ref] = number
            except RayError as error:
                # A lost object, a node out of memory: Ray's own trouble, not that of the function.
                raise _lost(waited[number], what, error) from error
    if failed is not None:
        raise failed from None
    if pending:
        late = [waited[number] for number in sorted(pending.values())]
        raise silent(late, what, seconds)
    return [results[number] for number in range(len(refs))]


def as_raised(error: RayTaskError, where: Waited) -> BaseException:
    """What the function itself has raised, with the traceback from there as a note."""
    cause = error.cause
    if not isinstance(cause, BaseException) or isinstance(cause, RayTaskError):
        return UnitrainError(f"{where} failed: {error}")
    lines = _COLOURS.sub("", str(error)).strip()
    cause.add_note(f"raised in {where}:\n{lines}")
    return cause


def silent(late: Sequence[Waited], what: str, seconds: float) -> ActorSilent:
    """The error for these actors, with the stack of the first."""
    first = late[0]
    others = f" (nor did {', '.join(str(other) for other in late[1:])})" if late[1:] else ""
    return ActorSilent(
        f"{first} did not answer within {seconds:g} s while {what}{others}.{_account(first, stack=True)}",
        first.name,
        first.host,
        first.pid,
    )


def _lost(where: Waited, what: str, error: RayError) -> ActorLost:
    kind = type(error).__name__
    reason = next((line.strip() for line in str(error).splitlines() if "died" in line or "node" in line), kind)
    return ActorLost(
        f"{where} was lost while {what}: {reason[:300]}.{_account(where, stack=False)}",
        where.name,
        where.host,
        where.pid,
    )


def _account(where: Waited, *, stack: bool) -> str:
    """What it last wrote, and where it stands: read here or by a task on its node."""
    if not where.pid:
        return ""
    try:
        if where.host == hostname():
            return look(where, stack)
        task = ray.remote(num_cpus=0, max_retries=0)(look).options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(where.node, soft=False)
        )
        account: str = ray.get(task.remote(where, stack), timeout=_LOOK_SECONDS)
        return account
    except (RayError, OSError, ValueError) as error:
        return f" Its node tells nothing of it ({type(error).__name__})."


def look(where: Waited, stack: bool) -> str:
    """Sentences on a process of this machine: its last lines, its state and, if wanted, its stack."""
    said = []
    if stack:
        said.append(_stack(where))
    lines = [line for path in where.logs for line in last_lines(path)]
    if lines:
        said.append("It last wrote:\n" + "\n".join(f"  {line}" for line in lines[-_NUM_LINES:]))
    return "".join(f" {sentence}" for sentence in said if sentence)


def last_lines(path: str) -> list[str]:
    """The end of a log; empty where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _NUM_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip()[:500] for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(":")][-_NUM_LINES:]


def _stack(where: Waited) -> str:
    try:
        state = Path(f"/proc/{where.pid}/stat").read_text().rpartition(")")[2].split()[0]
        before = os.stat(where.stacks).st_size
        if state in _STATES:
            return f"The process {_STATES[state]}."
        os.kill(where.pid, signal.SIGQUIT)
        deadline = time.monotonic() + _STACK_SECONDS
        while time.monotonic() < deadline and os.stat(where.stacks).st_size == before:
            time.sleep(0.05)
        time.sleep(0.05)
        written = Path(where.stacks).read_bytes()[before:].decode(errors="replace").strip()
    except OSError as error:
        return f"It has no stack ({error.strerror})."
    return f"Its stack:\n{written[-4000:]}\n" if written else "It answers no signal."
