"""How much better each token was than expected: advantage estimators, in float64, over the whole batch of a step.

They take the samples of all ranks at once, since means and variances belong to the global batch. What stands in
masked places, NaN included, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError, UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Episodes:
    """What advantages are estimated from; one row a sample, one column a token."""

    rewards: NDArray[np.floating]  # (rows, tokens); the KL penalty included where it is part of the reward
    mask: NDArray[np.bool_]  # (rows, tokens): tokens that the policy chose; a row without any takes part in nothing
    groups: NDArray[np.int64] | None = None  # (rows,): samples of the same prompt have the same number
    values: NDArray[np.floating] | None = None  # (rows, tokens): the critic's, of the state before each token

    def __post_init__(self) -> None:
        for name, shape in (("rewards", self.mask.shape), ("values", self.mask.shape), ("groups", self.mask.shape[:1])):
            found = getattr(self, name)
            assert found is None or found.shape == shape, f"{name} of shape {found.shape}, but {shape} is needed"

    @property
    def alive(self) -> NDArray[np.bool_]:
        """(rows,): which samples take part."""
        return np.asarray(self.mask.any(axis=1))

    def totals(self) -> Array:
        """(rows,): the sum of each sample's rewards."""
        return np.asarray(filled(self.rewards, self.mask).sum(axis=1))


class Advantages(NamedTuple):
    """Both (rows, tokens), 0 where masked. `returns` are what a critic learns, None without one."""

    advantages: Array
    returns: Array | None = None


Estimator = Callable[[Episodes], Advantages]


def gae(episodes: Episodes, *, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True) -> Advantages:
    """Generalised advantage estimation (Schulman et al., 2016, equation 16); returns are advantages + values.

        delta_t = r_t + gamma V(s_t+1) - V(s_t)        A_t = delta_t + gamma lam A_t+1

    t runs over unmasked tokens alone: masked ones in between are stepped over, and nothing follows the last.
    """
    if episodes.values is None:
        raise UserError("gae needs a critic's values; give the run a critic, or use grpo, rloo or reinforce++")
    mask, rewards = episodes.mask, filled(episodes.rewards, episodes.mask)
    values = filled(episodes.values, mask)
    advantages = np.zeros_like(rewards)
    following, last = np.zeros(len(mask)), np.zeros(len(mask))  # V(s_t+1) and A_t+1 of each row
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        last = np.where(mask[:, t], delta + gamma * lam * last, last)
        following = np.where(mask[:, t], values[:, t], following)
        advantages[:, t] = np.where(mask[:, t], last, 0)
    returns = advantages + values
    return Advantages(whitened(advantages, mask) if whiten else advantages, returns)


def grpo(episodes: Episodes, *, scale: str = "group", eps: float = 1e-4) -> Advantages:
    """(r - mean) / (std + eps) of the samples of a prompt (Shao et al., "DeepSeekMath", 2024, section 4.1.2).

    Unbiased std; `scale` is group, batch (std of all rewards: Hu et al., 2025) or none. eps is TRL's.
    """
    if scale not in ("group", "batch", "none"):
        raise RecipeError(f"the option scale of grpo is {scale!r}; it is group, batch or none")
    rewards, alive = episodes.totals(), episodes.alive
    centred = np.zeros_like(rewards)
    for rows in _groups(episodes):
        centred[rows] = _centred(rewards[rows])
        if scale == "group" and len(rows) > 1:
            centred[rows] /= rewards[rows].std(ddof=1) + eps
    if scale == "batch" and alive.sum() > 1:
        centred /= rewards[alive].std(ddof=1) + eps
    return Advantages(_spread(centred, episodes.mask))


def dr_grpo(episodes: Episodes) -> Advantages:
    """r - mean of the samples of a prompt (Liu et al., "Understanding R1-Zero-Like Training", 2025, section 3.2).

    Its other half is the normaliser: aggregate the loss with `constant`.
    """
    return grpo(episodes, scale="none")


def rloo(episodes: Episodes) -> Advantages:
    """r - mean of the prompt's other samples (Ahmadian et al., "Back to Basics", 2024; Kool et al., 2019).

    The same as n / (n - 1) x (r - mean of all n); 0 for a sample that has no others.
    """
    rewards = episodes.totals()
    found = np.zeros_like(rewards)
    for rows in _groups(episodes):
        if len(rows) > 1:
            found[rows] = _centred(rewards[rows]) * len(rows) / (len(rows) - 1)
    return Advantages(_spread(found, episodes.mask))


def reinforce_pp(episodes: Episodes, *, gamma: float = 1.0) -> Advantages:
    """The discounted sum of the rewards from each token on, whitened over the batch (Hu, "REINFORCE++", 2025).

    It needs neither critic nor groups; the KL penalty belongs into the rewards (`kl.where: reward`).
    """
    rewards = filled(episodes.rewards, episodes.mask)
    sums, last = np.zeros_like(rewards), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        last = np.where(episodes.mask[:, t], rewards[:, t] + gamma * last, last)
        sums[:, t] = last
    return Advantages(whitened(sums, episodes.mask))


def whitened(values: NDArray[np.floating], mask: NDArray[np.bool_]) -> Array:
    """Mean 0 and unbiased variance 1 over unmasked places (with 1e-8 under the root, as TRL has it), 0 elsewhere."""
    chosen = values[mask].astype(np.float64)
    found = np.zeros(mask.shape)
    if len(chosen) > 1:
        found[mask] = (chosen - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8)
    return found


def filled(values: NDArray[np.floating], mask: NDArray[np.bool_]) -> Array:
    """Values in float64, 0 where masked: 0 times NaN would be NaN."""
    return np.where(mask, values, 0.0).astype(np.float64)


def _groups(episodes: Episodes) -> list[NDArray[np.int64]]:
    """The rows of each prompt that take part. Raises UserError where every prompt has one sample."""
    groups = episodes.groups
    if groups is None or len(np.unique(groups)) == len(groups) > 0:
        raise UserError(
            "grpo, dr_grpo and rloo compare samples of the same prompt, and here every prompt has one; "
            "use at least 2 samples per prompt, or gae or reinforce++"
        )
    rows = np.flatnonzero(episodes.alive)
    return [rows[groups[rows] == group] for group in np.unique(groups[rows])]


def _centred(rewards: Array) -> Array:
    """Less their mean; exactly 0 where all are alike, of which rounding would leave a rest."""
    return np.zeros_like(rewards) if rewards.min() == rewards.max() else np.asarray(rewards - rewards.mean())


def _spread(per_row: Array, mask: NDArray[np.bool_]) -> Array:
    """(rows,) to every unmasked token of the row."""
    return np.where(mask, per_row[:, None], 0.0)
