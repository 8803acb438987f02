"""The toy problem of the conformance suite in TensorFlow, as a tf.Module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from unitrain.models.layout import SAME, TRANSPOSED, Layout, Rule
from unitrain.strategy import Loss

from .toy import NUM_HIDDEN, NUM_IN, NUM_OUT


class Linear(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
    """x @ kernel + bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = tf.Variable(tf.random.normal([inputs, outputs]))
        self.bias = tf.Variable(tf.zeros([outputs]))

    def __call__(self, x: Any) -> Any:
        """(rows, inputs) -> (rows, outputs)."""
        return x @ self.kernel + self.bias


class ToyModel(tf.Module):  # type: ignore[misc]  # TensorFlow has no types
    """Two linear layers with a tanh between."""

    layout = Layout(
        Rule(r"(hidden|out)\.kernel", r"\1.weight", TRANSPOSED),
        Rule(r"(hidden|out)\.bias", r"\1.bias", SAME),
    )

    def __init__(self) -> None:
        super().__init__()
        self.hidden = Linear(NUM_IN, NUM_HIDDEN)
        self.out = Linear(NUM_HIDDEN, NUM_OUT)
        self.training = False
        self.ran_in_training = False  # when it was last called

    def __call__(self, x: Any) -> Any:
        """(rows, 6) -> (rows, 3)."""
        self.ran_in_training = self.training
        return self.out(tf.tanh(self.hidden(x)))


def toy_loss(model: ToyModel, batch: Mapping[str, Any]) -> Loss:
    """Weighted squared error; also counts rows as a metric."""
    error = 0.5 * tf.reduce_sum(tf.square(model(batch["x"]) - batch["y"]), axis=1)
    rows = tf.math.count_nonzero(batch["weight"])
    metrics = {"counted": (rows, len(error))}
    return Loss(tf.reduce_sum(batch["weight"] * error), tf.reduce_sum(batch["weight"]), metrics)


def probe(model: ToyModel) -> tuple[list[float], bool]:
    """A forward pass over fixed rows, and whether the model was in training mode."""
    x = tf.reshape(tf.linspace(-1.0, 1.0, 2 * NUM_IN), [2, NUM_IN])
    return tf.reshape(model(x), [-1]).numpy().tolist(), model.ran_in_training
