"""The MLP of models/config.py in Keras 3, on any of its backends: the twin of mlp_torch.py."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from .config import MLP
from .layout import TRANSPOSED, Layout, Rule

Tensor = Any  # of the backend


class MLPModule(keras.Model):  # type: ignore[misc]  # Keras has no types
    """Samples (rows, ...) to logits (rows, classes)."""

    layout = Layout(
        Rule(r"layers_(\d+)/kernel", r"layers.\1.weight", TRANSPOSED),
        Rule(r"layers_(\d+)/bias", r"layers.\1.bias"),
        Rule(r"head/kernel", "head.weight", TRANSPOSED),
        Rule(r"head/bias", "head.bias"),
    )

    def __init__(self, config: MLP) -> None:
        super().__init__(name="mlp")
        self.config = config
        # Not `layers`, which Keras has for all of them.
        self.hidden = [
            keras.layers.Dense(width, activation="relu", name=f"layers_{number}")
            for number, width in enumerate(config.hidden)
        ]
        self.dropout = keras.layers.Dropout(config.dropout, name="dropout")
        self.head = keras.layers.Dense(config.num_classes, name="head")
        self.build((None, config.in_features))

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make all variables; in `build`, for their paths begin with the paths of what builds them."""
        for layer in (*self.hidden, self.head):
            layer.build(input_shape)
            input_shape = (None, layer.units)

    def call(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        x = ops.reshape(x, (-1, self.config.in_features))
        for layer in self.hidden:
            x = self.dropout(layer(x))
        return self.head(x)
