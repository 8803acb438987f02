"""How far a run is from the reference: its losses step by step, and its final weights tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import CheckpointReader
from ..strategy import ShardReader
from .plan import Tier
from .trial import Outcome

# Below this share of the model's RMS gradient an element's gradient is mostly rounding, which AdamW scales up to
# steps of full length: attention's key bias, whose gradient is zero in exact arithmetic, then walks at random.
LEAST_GRADIENT = 1e-4


class Weights(NamedTuple):
    """The largest difference of a final weight, relative to the largest of its tensor in the reference."""

    difference: float  # infinite where one run lacks a tensor or has it in another shape
    tensor: str  # "role name" of the one that differs most
    left_out: int  # elements whose gradient is mostly rounding
    compared: int  # elements


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run against the reference, under a tier."""

    tier: Tier
    differences: list[float]  # of each step's loss, relative
    weights: Weights

    @property
    def largest(self) -> float:
        """Of the losses' differences."""
        return max(self.differences)

    @property
    def first_beyond(self) -> int | None:
        """The first step, from 1, whose loss is further away than the tier allows."""
        return next((step for step, far in enumerate(self.differences, 1) if far > self.tier.losses), None)

    @property
    def agrees(self) -> bool:
        """True when losses and weights are as near as the tier asks."""
        return self.first_beyond is None and self.weights.difference <= self.tier.weights

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.first_beyond is not None:
            return "losses differ"
        return "agrees" if self.agrees else "weights differ"


def compare(outcome: Outcome, reference: Outcome) -> Comparison:
    """Both runs must have ended well. Raises CheckpointError where a checkpoint cannot be read."""
    ours, theirs = CheckpointReader(outcome.checkpoint), CheckpointReader(reference.checkpoint)
    return Comparison(
        tier=outcome.trial.tier,
        differences=relative(outcome.losses, reference.losses),
        weights=compare_weights(ours, theirs),
    )


def relative(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """|a - b| / |b| of each pair; infinite where one is not finite (None) or only b is zero."""
    return [_relative(a, b) for a, b in zip(ours, theirs, strict=True)]


def _relative(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return math.inf
    if a == b:
        return 0.0
    return abs(a - b) / abs(b) if b else math.inf


def compare_weights(ours: CheckpointReader, theirs: CheckpointReader) -> Weights:
    """Every parameter of every role, one in memory at a time; `theirs` is the reference."""
    worst, tensor, left_out, compared = 0.0, "", 0, 0
    for role in sorted({*ours.roles, *theirs.roles}):
        if role not in ours.roles or role not in theirs.roles:
            return Weights(math.inf, role, left_out, compared)
        mine, reference = ours.role(role), theirs.role(role)
        here, there = _params(mine), _params(reference)
        if here != there:
            differing = next(name for name in sorted({*here, *there}) if here.get(name) != there.get(name))
            return Weights(math.inf, f"{role} {differing}", left_out, compared)
        floor = LEAST_GRADIENT * _rms_gradient(reference)
        for name in here:
            a, b = _values(mine, "param", name), _values(reference, "param", name)
            off = np.abs(a - b)
            counts = _gradient(reference, name) >= floor if floor and ("adamw.v", name) in reference.tensors else None
            if counts is not None:
                left_out += int(counts.size - np.count_nonzero(counts))
                off = off[counts]
            compared += off.size
            scale = float(np.abs(b).max(initial=0.0))
            far = float(off.max(initial=0.0))
            far = 0.0 if far == 0 else far / scale if scale else math.inf
            if not far <= worst:  # also where it is not a number
                worst, tensor = (math.inf if math.isnan(far) else far), f"{role} {name}"
    return Weights(worst, tensor, left_out, compared)


def _params(reader: ShardReader) -> dict[str, tuple[int, ...]]:
    return {name: tuple(info.shape) for (kind, name), info in reader.tensors.items() if kind == "param"}


def _rms_gradient(reader: ShardReader) -> float:
    """Root mean square over all elements whose second moment AdamW kept; 0 for other optimizers."""
    total, count = 0.0, 0
    for kind, name in reader.tensors:
        if kind == "adamw.v":
            squares = _values(reader, kind, name)
            total, count = total + float(squares.sum()), count + squares.size
    return math.sqrt(total / count) if count else 0.0


def _gradient(reader: ShardReader, name: str) -> NDArray[Any]:
    return np.sqrt(_values(reader, "adamw.v", name))


def _values(reader: ShardReader, kind: str, name: str) -> NDArray[np.float64]:
    """A whole tensor in float64, so that the difference adds no rounding of its own."""
    info = reader.tensors[kind, name]
    values = reader.read(kind, name, (0,) * len(info.shape), tuple(info.shape))
    if info.dtype == "bfloat16":  # its bits travel as uint16
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)
