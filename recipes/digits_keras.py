"""A Keras 3 model for `trainer: digits_keras.py:KerasDigits`: this file runs unchanged on torch, JAX and TensorFlow.

It uses nothing but `keras` and `keras.ops`. The strategy says which backend Keras runs on; the Trainer sees to that
before this file is imported.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from unitrain import Loss, Trainer


class KerasDigits(Trainer):
    """Classifies 8 x 8 images. `model:` has channels (32), dropout (0) and norm (group or batch)."""

    def build_model(self) -> keras.Model:
        """A model that is built: it begins with keras.Input, so that all its variables exist."""
        options = self.recipe.model.options
        channels = options.get("channels", 32)

        def normalisation() -> keras.Layer:
            if options.get("norm", "group") == "batch":
                return layers.BatchNormalization()
            return layers.GroupNormalization(groups=8)

        image = keras.Input((1, 8, 8))
        x = layers.Reshape((8, 8, 1))(image)
        for _ in range(2):
            x = layers.Conv2D(channels, 3, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
            x = layers.AveragePooling2D(2)(ops.silu(normalisation()(x)))
        x = layers.Flatten()(x)
        x = layers.Dropout(options.get("dropout", 0.0))(x)
        return keras.Model(image, layers.Dense(10, name="head")(x))

    def loss(self, model: keras.Model, batch: dict[str, Any]) -> Loss:
        """Cross entropy in nats, summed over rows; also the share of rows that are classified correctly."""
        logits = model(batch["x"])
        each = keras.losses.sparse_categorical_crossentropy(batch["y"], logits, from_logits=True)
        right = ops.cast(ops.equal(ops.argmax(logits, axis=1), batch["y"]), "float32")
        rows = ops.sum(ops.ones_like(right))
        return Loss(ops.sum(each), rows, {"accuracy": (ops.sum(right), rows)})
