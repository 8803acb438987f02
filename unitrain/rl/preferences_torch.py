"""What is learnt from preferences: Bradley-Terry reward models, DPO and its relatives, each as (sum, weight)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..errors import RecipeError
from ..recipe import above, at_least
from ..strategy import Loss


class Pairs(NamedTuple):
    """Log-probabilities of whole responses, summed over their tokens, and how many tokens they have; all (pairs,)."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    weight: Tensor | None = None  # how much each pair counts, 0 for filler; None: 1

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log pi / ref of the chosen and of the rejected responses."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected


def reward_model_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center: float = 0.0, weight: Tensor | None = None
) -> Loss:
    """-log sigmoid(r_chosen - r_rejected - margin), of scores (pairs,): Bradley and Terry, 1952; Ouyang et al., 2022.

    `margin` is Touvron et al.'s ("Llama 2", 2023, equation 2). `center` times (r_chosen + r_rejected)^2 keeps scores
    near 0, which the loss itself leaves free (Eisenstein et al., 2023).
    """
    at_least("the option center", center, 0)
    difference = chosen - rejected
    losses = -logsigmoid(difference if margin is None else difference - margin)
    if center:
        losses = losses + center * (chosen + rejected) ** 2
    return _weighted(losses, weight, {"accuracy": (difference > 0).to(losses.dtype), "margin": difference})


def dpo(pairs: Pairs, *, beta: float = 0.1) -> Loss:
    """-log sigmoid(beta (log-ratio of chosen - of rejected)): Rafailov et al., 2023, equation 7."""
    return _paired(pairs, beta, -logsigmoid(beta * _difference(pairs)))


def cdpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Loss:
    """DPO for labels of which a share is wrong: Mitchell, "A note on DPO with noisy preferences", 2023."""
    if not 0 <= label_smoothing < 0.5:
        raise RecipeError(f"the option label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5")
    z = beta * _difference(pairs)
    return _paired(pairs, beta, -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z))


def ipo(pairs: Pairs, *, beta: float = 0.1, per_token: bool = True) -> Loss:
    """(difference of log-ratios - 1 / (2 beta))^2: Azar et al., 2023, equation 17.

    `per_token` takes each log-ratio as a mean over the response's tokens, as TRL does in agreement with the authors.
    """
    above("the option beta of ipo", beta, 0)
    chosen, rejected = pairs.log_ratios()
    if per_token:
        chosen = chosen / pairs.chosen_tokens.clamp(min=1)
        rejected = rejected / pairs.rejected_tokens.clamp(min=1)
    return _paired(pairs, beta, (chosen - rejected - 1 / (2 * beta)) ** 2)


def kto(
    logprobs: Tensor,
    ref: Tensor,
    desirable: Tensor,
    reference: float | Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weight: Tensor | None = None,
) -> Loss:
    """Single responses, each desirable or not: Ethayarajh et al., "KTO", 2024, equation 8. All tensors (rows,).

    lambda (1 - sigmoid(beta (log-ratio - reference))), with the opposite sign where undesirable. `reference` is that
    of the whole global batch: `kto_reference`.
    """
    above("the option beta of kto", beta, 0)
    ratio = logprobs - ref
    sign = torch.where(desirable, 1.0, -1.0).to(ratio.dtype)
    scale = torch.where(desirable, desirable_weight, undesirable_weight).to(ratio.dtype)
    losses = scale * (1 - torch.sigmoid(sign * beta * (ratio - reference)))
    return _weighted(losses, weight, {"reward": beta * ratio, "signed_reward": sign * beta * ratio})


def kto_reference(logprobs: Tensor, ref: Tensor, weight: Tensor | None = None) -> Loss:
    """The KL that KTO compares with, as (sum, weight): add up over micro-batches and ranks, divide, take at least 0.

    Of prompts with another prompt's response, an estimate of KL(policy || reference) without gradient.
    """
    return _weighted((logprobs - ref).detach(), weight, {})


def _difference(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.log_ratios()
    return chosen - rejected


def _paired(pairs: Pairs, beta: float, losses: Tensor) -> Loss:
    above("the option beta", beta, 0)
    chosen, rejected = (beta * ratio for ratio in pairs.log_ratios())
    metrics = {
        "accuracy": (chosen > rejected).to(losses.dtype),
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return _weighted(losses, pairs.weight, metrics)


def _weighted(losses: Tensor, weight: Tensor | None, metrics: dict[str, Tensor]) -> Loss:
    """Sums over rows; where the weight is 0, nothing counts, not even NaN."""
    share = torch.ones_like(losses) if weight is None else weight.to(losses.dtype)
    total = share.sum()

    def summed(values: Tensor) -> Tensor:
        return (torch.where(share > 0, values, 0) * share).sum()

    return Loss(summed(losses), total, {name: (summed(values.detach()), total) for name, values in metrics.items()})
