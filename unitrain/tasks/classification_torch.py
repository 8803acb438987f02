"""The classifier's loss in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..strategy import Loss


def loss(task: object, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Cross entropy in nats, in fp32, summed over rows; also the share of rows that are classified correctly."""
    logits, classes = model(batch["x"]).float(), batch["y"].long()
    total = nn.functional.cross_entropy(logits, classes, reduction="sum")
    correct = (logits.argmax(dim=1) == classes).sum()
    return Loss(total, len(classes), {"accuracy": (correct, len(classes))})
