"""When is a rank stuck? Decided by how long the run's own steps take; and what all ranks are doing at that moment."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..heartbeat import Phase, Pulse

FLOOR_SECONDS = 30.0  # a slow disk or a busy machine may hold a healthy step up for so long
TIMES_THE_LONGEST = 8
_RECENT = 64
# Imports, joining, compiling, evaluating and saving: long, seldom and of unknown length.
_OTHER_SECONDS = 3600.0
_STACKS_SECONDS = 2.0
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Hang:
    """The rank that holds up all others."""

    rank: int
    seconds: float  # without progress
    step: int
    phase: Phase
    stopped: bool  # by SIGSTOP or a terminal

    @property
    def blame(self) -> tuple[bool, int, float]:
        """The least of several ranks is to blame: a stopped one, else the furthest behind, for the longest."""
        return not self.stopped, self.step, -self.seconds

    def __str__(self) -> str:
        doing = (
            f"step {self.step + 1}" if self.phase == Phase.STEP else f"{self.phase.name.lower()} at step {self.step}"
        )
        stopped = ", stopped by a signal" if self.stopped else ""
        return f"made no progress in {doing} for {self.seconds:.1f} s{stopped}"


class Watch:
    """Follows the beats of one attempt's ranks. A rank that never beats is not watched. Times are monotonic."""

    def __init__(self, hang_seconds: float | None = None) -> None:
        self._hang_seconds = hang_seconds
        self._seen: dict[int, tuple[Pulse, float]] = {}  # rank -> its pulse, and when that was new
        self._longest: dict[str, deque[float]] = {}

    def look(self, rank: int, pulse: Pulse, now: float) -> None:
        """Take note of a rank's pulse."""
        before = self._seen.get(rank)
        if before is None or before[0].beats != pulse.beats:
            if before is not None and before[0].beats:
                self._longest.setdefault(_kind(before[0]), deque(maxlen=_RECENT)).append(now - before[1])
            self._seen[rank] = pulse, now

    def hang(self, alive: Collection[int], pids: Mapping[int, int], now: float) -> Hang | None:
        """The rank that is to blame, once one is overdue."""
        silent = {rank: now - since for rank, (pulse, since) in self._seen.items() if rank in alive and pulse.beats}
        if not any(seconds > self._least() for seconds in silent.values()):
            return None
        stopped = {rank for rank in silent if rank in pids and is_stopped(pids[rank])}
        if not any(seconds > self._limit(rank, stopped) for rank, seconds in silent.items()):
            return None
        return self.slowest(alive, pids, now)

    def slowest(self, alive: Collection[int], pids: Mapping[int, int], now: float) -> Hang | None:
        """The rank to blame if anything is wrong: a stopped one, else the furthest behind for the longest."""
        silent = {rank: now - since for rank, (pulse, since) in self._seen.items() if rank in alive and pulse.beats}
        if not silent:
            return None
        stopped = {rank for rank in silent if rank in pids and is_stopped(pids[rank])}
        blamed = min(silent, key=lambda rank: (rank not in stopped, self._seen[rank][0].step, -silent[rank]))
        pulse = self._seen[blamed][0]
        return Hang(blamed, silent[blamed], pulse.step, pulse.phase, blamed in stopped)

    def _least(self) -> float:
        """No limit is below this."""
        return FLOOR_SECONDS if self._hang_seconds is None else self._hang_seconds

    def _limit(self, rank: int, stopped: Collection[int]) -> float:
        """How long the rank may take for what it does now."""
        kind = _kind(self._seen[rank][0])
        if rank in stopped or (kind == "step" and self._hang_seconds is not None):
            return self._least()
        if kind == "finishing":
            return math.inf  # what a user's `finish` does takes as long as it takes
        floor = FLOOR_SECONDS if kind == "step" else max(_OTHER_SECONDS, self._least())
        return max(floor, TIMES_THE_LONGEST * max(self._longest.get(kind, ()), default=0.0))


def is_stopped(pid: int) -> bool:
    """True for a process that SIGSTOP or a terminal holds."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


def stacks_file(attempt: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return attempt / f"stacks-rank-{rank}.txt"


def write_stacks(attempt: Path, pids: Mapping[int, int]) -> list[int]:
    """Have these ranks write the stacks of all their threads; the ranks that did.

    A rank that has not registered for it would die of the signal and is not asked.
    """
    asked = {rank: pid for rank, pid in pids.items() if stacks_file(attempt, rank).exists()}
    for pid in asked.values():
        _send(pid, signal.SIGQUIT)
        _send(pid, signal.SIGCONT)  # a stopped one wakes up with the other signal waiting, and obeys it first
    deadline = time.monotonic() + _STACKS_SECONDS
    sizes: dict[int, int] = {}
    while True:
        before, sizes = sizes, {rank: stacks_file(attempt, rank).stat().st_size for rank in asked}
        if (before == sizes and all(sizes.values())) or time.monotonic() > deadline:
            return [rank for rank, size in sizes.items() if size]
        time.sleep(_POLL_SECONDS)


def _kind(pulse: Pulse) -> str:
    return "first step" if pulse.phase == Phase.STEP and not pulse.finished else pulse.phase.name.lower()


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended, which its parent tells
