"""Whether a run whose attempt failed is started again: a pure decision from how its attempts ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from ..errors import ExitCode

_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 1.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How one attempt failed."""

    exit_code: int = ExitCode.FAILED  # of the rank that failed first; negative: the signal that killed it
    raised: bool = False  # by a Python exception of its own
    finished: int = 0  # steps that the attempt had finished
    rank: int = 0  # that failed first
    retry: bool = True  # False: the training itself failed, and would again
    progress: bool = False  # it has left a newer checkpoint than it started from


class Decision(NamedTuple):
    """Start again after so many seconds, or end with an exit code."""

    restart: bool
    after_seconds: float = 0.0
    exit_code: int = ExitCode.FAILED


def decide(faults: Sequence[Fault], restarts: int) -> Decision:
    """What follows the last of these faults, which are those of all attempts so far, oldest first.

    The first attempt in a row without progress is followed by another at once, the next ones after 1, 2, 4, ...
    seconds; `restarts` of them in a row end the run.
    """
    last = faults[-1]
    if last.exit_code == ExitCode.BAD_RECIPE:
        return Decision(False, exit_code=ExitCode.BAD_RECIPE)
    # An exception before any step is most likely a mistake in the user's code.
    if restarts == 0 or not last.retry or (last.raised and last.finished == 0):
        return Decision(False)
    idle = in_vain(faults)
    if idle >= restarts:
        return Decision(False, exit_code=ExitCode.CRASH_LOOP)
    wait = 0.0 if idle <= 1 else min(_BACKOFF_SECONDS * 2 ** (idle - 2), _LONGEST_BACKOFF_SECONDS)
    return Decision(True, after_seconds=wait)


def in_vain(faults: Sequence[Fault]) -> int:
    """How many attempts in a row, up to the last one, have left no newer checkpoint."""
    return sum(1 for _ in takewhile(lambda fault: not fault.progress, reversed(faults)))
