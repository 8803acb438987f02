"""What to do about samples that another policy drew: how far it is from the trainer's, and weights that correct it.

The rollout's log-probabilities differ from the trainer's by rounding and kernels, and by staleness where generation
runs ahead. The trainer's own, computed before the first update of a step, are what losses call `old`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..recipe import above, one_of
from .kl import MOST

THRESHOLDS = MappingProxyType({"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2})  # of the mean |difference|, same weights
MOST_IMPORTANCE = 0.2  # the mean ratio is 1 but for chance; farther away, truncated weights no longer correct much


class Gap(NamedTuple):
    """How far the rollout's log-probabilities are from the trainer's, over unmasked tokens."""

    tokens: int
    mean: float  # of |difference|, nats
    most: float
    probability: float  # mean |difference of probabilities|: above 0.01 is bad (verl's experience)
    kl: float  # k3 estimate of KL(rollout || trainer)
    ratio: float  # mean of trainer / rollout probability; 1 when all is well

    def problem(self, precision: str) -> str:
        """A sentence where samples of the trainer's own weights differ more than arithmetic explains; else empty."""
        allowed = THRESHOLDS[precision]
        if not self.tokens or self.mean <= allowed:
            return ""
        return (
            f"the rollout's log-probabilities differ from the trainer's by {self.mean:.2g} on average, at most "
            f"{self.most:.2g}; {precision} explains {allowed:g}: do both use the same weights and temperature?"
        )


def gap(trainer: NDArray[np.floating], rollout: NDArray[np.floating], mask: NDArray[np.bool_]) -> Gap:
    """Compare log-probabilities of the same tokens, all (rows, tokens).

    Leave stale samples out of the mask where `problem` is asked: their difference is meant.
    """
    if not mask.any():
        return Gap(0, 0.0, 0.0, 0.0, 0.0, 1.0)
    mine, theirs = trainer[mask].astype(np.float64), rollout[mask].astype(np.float64)
    difference = np.clip(mine - theirs, -MOST, MOST)
    return Gap(
        tokens=len(difference),
        mean=float(np.abs(difference).mean()),
        most=float(np.abs(difference).max()),
        probability=float(np.abs(np.exp(mine) - np.exp(theirs)).mean()),
        kl=float((np.expm1(difference) - difference).mean()),
        ratio=float(np.exp(difference).mean()),
    )


def correction(
    trainer: NDArray[np.floating],
    rollout: NDArray[np.floating],
    mask: NDArray[np.bool_],
    *,
    level: str = "token",
    cap: float = 2.0,
    beyond: str = "truncate",
) -> NDArray[np.float64]:
    """Truncated importance weights min(pi_trainer / pi_rollout, cap), (rows, tokens), 0 where masked; no gradient.

    The truncated rho of IMPALA (Espeholt et al., 2018), for rollout engines by Yao et al., "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training", 2025. `level` token, or sequence: one weight a sample, of
    the product over its tokens. `beyond` drop gives weight 0 to what is above the cap, and not the cap.
    """
    one_of("rl.correction.level", level, ("token", "sequence"))
    one_of("rl.correction.beyond", beyond, ("truncate", "drop"))
    above("rl.correction.cap", cap, 0)
    difference = np.zeros(mask.shape)
    difference[mask] = trainer[mask].astype(np.float64) - rollout[mask]
    if level == "sequence":
        difference = np.broadcast_to(difference.sum(axis=1, keepdims=True), mask.shape)
    ratio = np.exp(np.clip(difference, -MOST, MOST))
    weights = np.minimum(ratio, cap) if beyond == "truncate" else np.where(ratio <= cap, ratio, 0)
    return np.where(mask, weights, 0.0)
