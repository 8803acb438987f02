"""The MLP of models/config.py in Flax NNX: the twin of mlp_torch.py."""

from __future__ import annotations

import itertools

import jax
from flax import nnx

from .config import MLP
from .layout import TRANSPOSED, Layout, Rule


class MLPModule(nnx.Module):
    """Samples (rows, ...) to logits (rows, classes)."""

    layout = Layout(
        Rule(r"(layers\.\d+|head)\.kernel", r"\1.weight", TRANSPOSED),
        Rule(r"(layers\.\d+|head)\.bias", r"\1.bias"),
    )

    def __init__(self, config: MLP, *, rngs: nnx.Rngs | None = None) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        widths = (config.in_features, *config.hidden)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs if config.dropout else None)
        self.layers = nnx.List(nnx.Linear(inputs, outputs, rngs=rngs) for inputs, outputs in itertools.pairwise(widths))
        self.head = nnx.Linear(widths[-1], config.num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of the classes."""
        # What NNX is given in fp32 it computes in fp32, even with weights in bf16.
        x = x.reshape(len(x), -1).astype(self.head.kernel.dtype)
        for layer in self.layers:
            x = self.dropout(nnx.relu(layer(x)))
        logits: jax.Array = self.head(x)
        return logits
