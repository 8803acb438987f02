"""The language model's loss in PyTorch, and how to sample from it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..models.gpt_torch import generate as generate
from ..models.gpt_torch import logits_of
from ..strategy import Loss


def loss(task: object, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Cross entropy in nats, in fp32: the sum over tokens and the number of tokens."""
    logits = logits_of(model(batch["tokens"].long())).flatten(0, 1).float()
    targets, weight = batch["targets"].long().flatten(), batch.get("weight")
    if weight is None:
        return Loss(nn.functional.cross_entropy(logits, targets, reduction="sum"), len(targets))
    each = nn.functional.cross_entropy(logits, targets, reduction="none")
    return Loss((each * weight.flatten()).sum(), weight.sum())
