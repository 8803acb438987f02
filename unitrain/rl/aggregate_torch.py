"""From a loss for each token to (sum, weight): what the global batch's loss is a mean over."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RecipeError
from ..recipe import one_of
from ..strategy import Loss
from .recipe import AGGREGATES as AGGREGATES


def aggregated(
    values: Tensor, mask: Tensor, aggregate: str = "token", max_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum and weight of values (rows, tokens) over unmasked tokens, by what a mean is taken over:

        token         all tokens of the batch                            (Yu et al., "DAPO", 2025)
        sequence      the samples, of each one's mean over its tokens    (Shao et al., "DeepSeekMath", 2024)
        sequence_sum  the samples, of each one's sum
        constant      the samples times `max_tokens`, of each one's sum  (Liu et al., "Dr. GRPO", 2025)

    Sums and weights add up over micro-batches and ranks. A row without tokens weighs nothing.
    """
    one_of("rl.aggregate", aggregate, AGGREGATES)
    if aggregate == "constant" and max_tokens is None:
        raise RecipeError("rl.aggregate constant divides by the most tokens of a response; say how many")
    kept = torch.where(mask, values, 0)
    counts = mask.sum(dim=1)
    if aggregate == "token":
        return kept.sum(), counts.sum().to(values.dtype)
    rows = kept.sum(dim=1)
    if aggregate == "sequence":
        rows = rows / counts.clamp(min=1)
    weight = (counts > 0).sum().to(values.dtype)
    return rows.sum(), weight * max_tokens if aggregate == "constant" and max_tokens is not None else weight


def plus(loss: Loss, coefficient: float, term: Loss, name: str) -> Loss:
    """A loss and a multiple of another over the same batch with the same aggregate; `name` is its metric."""
    metrics = {**loss.metrics, **term.metrics, name: (term.sum.detach(), term.weight)}
    total = loss.sum + coefficient * term.sum if coefficient else loss.sum
    return Loss(total, loss.weight, metrics)
