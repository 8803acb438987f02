"""Is training itself in order? Lost updates, loss spikes and replicas that differ, judged from values alone.

A loss is a spike when it is above median + guard.spike x MAD of the last accepted losses, both robust against the
spikes themselves. The judgement is a function of the losses, and what it needs is saved with every checkpoint: a
resumed run decides as one that nobody disturbed.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .cursor import Window, with_window
from .errors import Diverged, ReplicasDiffer
from .recipe import GuardRecipe

_LEAST_LOSSES = 16
_LEAST_SPREAD = 0.01  # of the median: losses that hardly differ would make a spike of any


class Reading(NamedTuple):
    """What one update gave."""

    step: int  # from 1
    loss: float
    applied: bool


class Spike(NamedTuple):
    """A loss far above those before it, and the last such one of the steps that were read together."""

    step: int
    last_step: int
    loss: float
    median: float
    limit: float


class Guard:
    """Counts lost updates, finds spikes, and knows which samples are skipped because of them."""

    def __init__(self, recipe: GuardRecipe) -> None:
        self.recipe = recipe
        self.losses: deque[float] = deque(maxlen=recipe.window)  # the last that were no spikes
        self.lost = 0  # updates, of the whole run
        self.lost_in_row = 0
        self.rollbacks = 0
        self.skipped: tuple[Window, ...] = ()

    def take(self, readings: Iterable[Reading]) -> tuple[list[int], Spike | None]:
        """Judge the updates since the last call, in order: the steps that were lost, and the first spike.

        After a spike the losses are not counted: a rollback takes these steps back.
        """
        lost: list[int] = []
        spike: Spike | None = None
        for step, loss, applied in readings:
            limit = self._limit()
            high = limit is not None and loss > limit  # a NaN is no spike: its update is lost
            if spike is not None:
                spike = spike._replace(last_step=step) if high else spike
            elif high:
                assert limit is not None, "it is above it"
                spike = Spike(step, step, loss, statistics.median(self.losses), limit)
            elif applied:
                if self.lost_in_row < self.recipe.max_skips:  # else it ends the run, whatever came after
                    self.lost_in_row = 0
                if math.isfinite(loss):
                    self.losses.append(loss)
            else:
                lost.append(step)
                self.lost += 1
                self.lost_in_row += 1
        return lost, spike

    def refuse_lost(self, step: int) -> None:
        """Raise Diverged where too many updates in a row were lost up to this step."""
        if self.lost_in_row >= self.recipe.max_skips:
            raise Diverged(
                f"the updates of {self.lost_in_row} steps in a row, up to step {step}, were lost because their "
                f"gradients were not finite (guard.max_skips is {self.recipe.max_skips}); lower the learning rate, or "
                "look for samples that cause it"
            )

    def refuse_spike(self, spike: Spike) -> None:
        """Raise Diverged where no rollback is left for this spike."""
        if self.rollbacks >= self.recipe.max_rollbacks:
            raise Diverged(
                f"the loss of step {spike.step} is {spike.loss:.4g}, above {spike.limit:.4g}, after {self.rollbacks} "
                f"rollbacks (guard.max_rollbacks is {self.recipe.max_rollbacks}); lower the learning rate, or raise "
                "guard.spike"
            )

    def skip(self, window: Window, rollback: int) -> None:
        """Take note of a rollback and of the samples that are skipped by it; a known one changes nothing."""
        self.skipped = with_window(self.skipped, window)
        self.rollbacks = max(self.rollbacks, rollback)

    def state(self) -> dict[str, Any]:
        """All that the next judgement depends on, as JSON."""
        return {
            "losses": list(self.losses),
            "lost": self.lost,
            "lost_in_row": self.lost_in_row,
            "rollbacks": self.rollbacks,
            "skipped": [list(window) for window in self.skipped],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was taken from; empty for a run that begins."""
        self.losses = deque(state.get("losses", ()), maxlen=self.recipe.window)
        self.lost, self.lost_in_row = state.get("lost", 0), state.get("lost_in_row", 0)
        self.rollbacks = state.get("rollbacks", 0)
        self.skipped = tuple((begin, end) for begin, end in state.get("skipped", ()))

    def _limit(self) -> float | None:
        """The highest loss that is no spike; None where nothing is judged."""
        if self.recipe.spike is None or len(self.losses) < min(_LEAST_LOSSES, self.recipe.window):
            return None
        median = statistics.median(self.losses)
        spread = statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.recipe.spike * max(spread, _LEAST_SPREAD * abs(median))


def refuse_differing(role: str, step: int, replicas: Mapping[str, Sequence[int]]) -> None:
    """Raise ReplicasDiffer naming the ranks and tensors (hashes by rank) that differ from what most ranks hold.

    Of two ranks nobody can tell which one is right: rank 1 is named.
    """
    differing: dict[int, list[str]] = {}
    for name, hashes in replicas.items():
        if len(counts := Counter(hashes)) > 1:
            most = max(counts, key=lambda value: (counts[value], value == hashes[0]))
            for rank, value in enumerate(hashes):
                if value != most:
                    differing.setdefault(rank, []).append(name)
    if not differing:
        return
    parts = []
    for rank, names in differing.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        parts.append(f"rank {rank} holds another {', '.join(names[:4])}{more}")
    raise ReplicasDiffer(
        f"after step {step} the replicas of role {role!r} differ: {'; '.join(parts)}; memory or a computation of that "
        "rank's machine is at fault, so go on from a checkpoint, if it happens again elsewhere"
    )
