"""The toy problem of the conformance suite in torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unitrain.strategy import Loss

from .toy import NUM_HIDDEN, NUM_IN, NUM_OUT


class ToyModel(nn.Module):
    """Two linear layers with a tanh between."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(NUM_IN, NUM_HIDDEN)
        self.out = nn.Linear(NUM_HIDDEN, NUM_OUT)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 6) -> (rows, 3)."""
        output: Tensor = self.out(torch.tanh(self.hidden(x)))
        return output

    def sharding_units(self) -> list[nn.Module]:
        """Two units, so that sharded strategies gather more than once."""
        return [self.hidden]


def toy_loss(model: ToyModel, batch: Mapping[str, Tensor]) -> Loss:
    """Weighted squared error; also counts rows as a metric."""
    error = 0.5 * (model(batch["x"]) - batch["y"]).square().sum(dim=1)
    rows = batch["weight"].ne(0).sum()
    return Loss((batch["weight"] * error).sum(), batch["weight"].sum(), {"counted": (rows, len(error))})


def probe(model: ToyModel) -> tuple[list[float], bool]:
    """A forward pass over fixed rows, and whether the model was in training mode."""
    x = torch.linspace(-1, 1, 2 * NUM_IN, device=next(model.parameters()).device).reshape(2, NUM_IN)
    return model(x).flatten().tolist(), model.training
