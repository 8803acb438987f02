"""The Trainers that the integration tests of the strategy `tensorflow` run."""

from __future__ import annotations

import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import unitrain

NUM_ROWS = {"train": 203, "eval": 37}  # odd: no batch size and no number of ranks divides them


class Rows(unitrain.Trainer):
    """Weighted least squares by a Keras model with running statistics and dropout."""

    seconds = 0.0  # of sleep in each step

    def build_model(self) -> Any:
        """(rows, 6) -> (rows, 1)."""
        layers = [
            keras.Input((6,)),
            keras.layers.Dense(11, activation="tanh", name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.2, name="drop"),
            keras.layers.Dense(1, name="out"),
        ]
        return keras.Sequential(layers, name="rows")

    def build_source(self, split: str) -> unitrain.Source:
        """x (rows, 6), y (rows, 1), weight (rows,), all float32."""
        draws = np.random.default_rng({"train": 0, "eval": 1}[split])
        rows = NUM_ROWS[split]
        x = draws.standard_normal((rows, 6)).astype(np.float32)
        y = np.tanh(x[:, :1] * x[:, 1:2]).astype(np.float32)
        weight = draws.integers(0, 5, rows).astype(np.float32) ** 2
        return unitrain.ArraySource(x=x, y=y, weight=weight)

    def loss(self, model: Any, batch: dict[str, Any]) -> unitrain.Loss:
        """Sum of weighted squares; also the share of rows that are off by less than a half."""
        errors = tf.reduce_sum(tf.square(model(batch["x"]) - batch["y"]), axis=1)
        near = tf.math.count_nonzero(errors < 0.25)
        metrics = {"near": (near, len(errors))}
        return unitrain.Loss(tf.reduce_sum(errors * batch["weight"]), tf.reduce_sum(batch["weight"]), metrics)

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """One update."""
        time.sleep(self.seconds)
        return super().step(batch)


class Slow(Rows):
    """Slow enough to be killed in the middle of a run."""

    seconds = 0.05


class Own(Rows):
    """Rows with an optimizer of Keras's own."""

    def roles(self) -> dict[str, unitrain.Role]:
        """RMSprop with momentum."""

        def optimizer(variables: list[Any]) -> Any:
            return keras.optimizers.RMSprop(1e-2, momentum=0.9, centered=True)

        return {"model": unitrain.Role(model=self.build_model, losses={"loss": self.loss}, optimizer=optimizer)}
