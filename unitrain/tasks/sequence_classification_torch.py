"""The loss of a classifier of texts in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..models.gpt_torch import logits_of
from ..strategy import Loss

if TYPE_CHECKING:
    from .sequence_classification import SequenceClassification


def loss(task: SequenceClassification, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Cross entropy in nats, in fp32, summed over rows; also the share of rows that are classified correctly."""
    mask, classes = batch["mask"].long(), batch["y"].long()
    tokens = batch["tokens"].long().masked_fill(mask == 0, task.pad)
    logits = logits_of(model(tokens, attention_mask=mask)).float()
    total = nn.functional.cross_entropy(logits, classes, reduction="sum")
    correct = (logits.argmax(dim=1) == classes).sum()
    return Loss(total, len(classes), {"accuracy": (correct, len(classes))})
