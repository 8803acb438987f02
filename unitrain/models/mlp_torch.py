"""The MLP of models/config.py in PyTorch. Canonical names: layers.N.weight, .bias, head.weight, .bias."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from .config import MLP


class MLPModule(nn.Module):
    """Samples (rows, ...) to logits (rows, classes)."""

    def __init__(self, config: MLP) -> None:
        super().__init__()
        widths = (config.in_features, *config.hidden)
        self.dropout = config.dropout
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        x = x.flatten(1)
        for layer in self.layers:
            x = nn.functional.dropout(nn.functional.relu(layer(x)), self.dropout, self.training)
        logits: Tensor = self.head(x)
        return logits

    def sharding_units(self) -> list[nn.Module]:
        """Submodules that a sharding strategy gathers and frees as one, in the order in which they run."""
        return list(self.layers)
