"""How far the policy has moved from its reference: KL estimators, and the coefficient that holds it.

With x = log pi(token) - log ref(token) of a token that pi drew:

    k1 = x        k2 = x^2 / 2        k3 = exp(-x) - 1 + x        (Schulman, "Approximating KL Divergence", 2020)

The expectations of k1 and k3 are KL(pi || ref); k3 is never negative; k2 is close to KL for small x. As a penalty in
the reward only the value counts. As a term of the loss the gradient counts: as they stand, k2 has that of
KL(pi || ref), k3 that of KL(ref || pi), and k1 has none in expectation. Corrected, that is times pi / pi_old
(DeepSeek-AI, "DeepSeek-V3.2", 2025, section 3.1), all three have that of KL(pi || ref), also after the first update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError
from ..recipe import above, at_least, key, one_of

MOST = 20.0  # |x| beyond it counts as it: exp(20) is half a billion, exp(89) no fp32 number
PLACES = ("loss", "reward", "none")


@dataclass(frozen=True, kw_only=True)
class KL:
    """The keys of `kl:` in a recipe."""

    where: str = key("loss", "`loss` (a term of the policy loss), `reward` (subtracted from each token's) or `none`")
    estimator: str = key("k3", "`k1`, `k2` or `k3`")
    corrected: bool = key(
        True, "in the loss, multiply by pi / pi_old, which makes the gradient that of KL(pi || ref); false: as in GRPO"
    )
    coef: float = key(0.0, "what the KL is multiplied by; where it adapts, at the beginning")
    target: float | None = key(None, "mean KL of a sample in nats towards which `coef` adapts; null: fixed")
    horizon: int = key(10000, "samples over which an adaptive `coef` follows the KL; more: slower")

    def __post_init__(self) -> None:
        one_of("kl.where", self.where, PLACES)
        one_of("kl.estimator", self.estimator, tuple(ESTIMATORS))
        at_least("kl.coef", self.coef, 0)
        at_least("kl.horizon", self.horizon, 1)
        if self.where == "loss" and self.estimator == "k1" and not self.corrected:
            raise RecipeError(
                "kl.estimator k1 in the loss has no gradient in expectation; use k2 or k3, corrected: true or "
                "where: reward"
            )
        if self.target is not None:
            above("kl.target", self.target, 0)
            above("kl.coef of an adaptive KL", self.coef, 0)


class KLControl:
    """The coefficient over time: fixed, or in proportion to the error (Ziegler et al., 2019, section 2.2).

    coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon
    """

    def __init__(self, options: KL) -> None:
        self.options = options
        self.coef = options.coef

    def update(self, kl: float, samples: int) -> None:
        """Take the mean KL of so many samples of a step, in nats a sample. A fixed coefficient stays."""
        if self.options.target is not None and np.isfinite(kl):
            error = float(np.clip(kl / self.options.target - 1, -0.2, 0.2))
            # A step of more samples than the horizon would make it negative.
            self.coef *= 1 + error * min(1.0, samples / self.options.horizon)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.coef = float(state["coef"])


def estimate(
    name: str, logprobs: NDArray[np.floating], ref: NDArray[np.floating], mask: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The estimate of each token, (rows, tokens), 0 where masked."""
    x = np.zeros(mask.shape)
    x[mask] = np.clip(logprobs[mask].astype(np.float64) - ref[mask], -MOST, MOST)
    return ESTIMATORS[name](x)


def _k1(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x


def _k2(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x**2 / 2


def _k3(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.expm1(-x) + x


ESTIMATORS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = MappingProxyType(
    {"k1": _k1, "k2": _k2, "k3": _k3}
)
