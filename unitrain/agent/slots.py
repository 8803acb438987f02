"""How many ranks this node can run now: told from outside by a file, or learned from ranks that never come to life."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from .restart import Fault

FILE = "slots"  # in the run's folder: a whole number; without it there are as many as the run was given
_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 60.0, 3600.0
_MOST_BYTES = 32


class Slots:
    """From `least` to `most` ranks; the agent asks each tick. Times are monotonic."""

    def __init__(self, run_dir: Path, *, least: int, most: int) -> None:
        self._path, self._least, self._most = run_dir / FILE, least, most
        self._told = most
        self._lost = 0
        self._retry_at, self._pause = 0.0, _RETRY_SECONDS

    def fitting(self, now: float) -> int:
        """The number of ranks to run with; never fewer than the least, even where the file says so."""
        if self._least == self._most:
            return self._most
        self._told = self._read()
        if self._lost and now >= self._retry_at:
            self._lost = 0  # whatever it was may have passed
        return max(self._least, min(self._told, self._most - self._lost))

    def lose(self, now: float) -> bool:
        """One slot starts no ranks any more, for a while that doubles each time; False where none can be spared."""
        if self._most - self._lost <= self._least:
            return False
        self._lost += 1
        self._retry_at = now + self._pause
        self._pause = min(2 * self._pause, _LONGEST_RETRY_SECONDS)
        return True

    def _read(self) -> int:
        """What the file says; while it is being written, what it said before."""
        try:
            with self._path.open("rb") as file:
                text = file.read(_MOST_BYTES)
        except OSError:
            return self._most
        with contextlib.suppress(ValueError):
            return int(text)
        return self._told


def starts_fail(faults: Sequence[Fault]) -> bool:
    """True when the same rank has failed twice in a row before its first step, without a word: its slot is lost."""
    if len(faults) < 2:
        return False
    one, other = faults[-2:]
    return one.rank == other.rank and not any(fault.raised or fault.finished for fault in (one, other))
