"""A small problem whose every number is known: data, initial weights, and a numpy oracle of its training.

Rows carry very different weights, so that a mean of means shows; sizes are odd, so that shards are uneven.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from unitrain.cursor import mix
from unitrain.data.source import Source
from unitrain.recipe import OptimizerRecipe

NUM_ROWS, NUM_IN, NUM_HIDDEN, NUM_OUT = 46, 6, 5, 3
SHAPES = {
    "hidden.weight": (NUM_HIDDEN, NUM_IN),
    "hidden.bias": (NUM_HIDDEN,),
    "out.weight": (NUM_OUT, NUM_HIDDEN),
    "out.bias": (NUM_OUT,),
}
Arrays = dict[str, NDArray[np.float64]]


class ToySource(Source):
    """Rows of x, y and a weight each; `poison` makes one row's x infinite."""

    tokens_per_sample = 2

    def __init__(self, poison: int | None = None) -> None:
        draw = np.random.Generator(np.random.Philox(key=20))
        self.x = draw.standard_normal((NUM_ROWS, NUM_IN)).astype(np.float32)
        self.y = draw.standard_normal((NUM_ROWS, NUM_OUT)).astype(np.float32)
        self.weight = draw.integers(0, 6, NUM_ROWS).astype(np.float32) ** 2
        if poison is not None:
            self.x[poison] = np.inf
            self.weight[poison] = 1.0

    def __len__(self) -> int:
        return NUM_ROWS

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[np.float32]]:
        """x (rows, 6), y (rows, 3), weight (rows,), all float32."""
        return {"x": self.x[ids], "y": self.y[ids], "weight": self.weight[ids]}


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Initial weights, the same bits in every framework."""
    draw = np.random.Generator(np.random.Philox(key=mix(seed, *name.encode())))
    return (0.5 * draw.standard_normal(shape)).astype(np.float32)


class Oracle:
    """The toy model trained in float64 numpy by the formulas of the strategy contract, on one rank."""

    def __init__(self, optimizer: OptimizerRecipe, seed: int) -> None:
        self.optimizer = optimizer
        self.source = ToySource()
        self.params: Arrays = {name: initial_value(name, shape, seed).astype(float) for name, shape in SHAPES.items()}
        self.m: Arrays = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        self.v: Arrays = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        self.updates = 0

    def evaluate(self, ids: NDArray[np.int64]) -> tuple[float, float]:
        """(sum of weighted losses, sum of weights) over those rows."""
        total, weight, _ = self._pass(ids)
        return total, weight

    def step(self, ids: NDArray[np.int64], lr: float) -> tuple[float, float]:
        """One update on those rows; (mean loss, gradient norm before clipping)."""
        total, weight, sums = self._pass(ids)
        grads = {name: grad / weight for name, grad in sums.items()}
        norm = float(np.sqrt(sum((grad**2).sum() for grad in grads.values())))
        clip = self.optimizer.clip
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        beta1, beta2 = self.optimizer.betas
        self.updates += 1
        for name, param in self.params.items():
            grad = grads[name] * factor
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * grad
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * grad**2
            m_hat = self.m[name] / (1 - beta1**self.updates)
            v_hat = self.v[name] / (1 - beta2**self.updates)
            param *= 1 - lr * self.optimizer.weight_decay
            param -= lr * m_hat / (np.sqrt(v_hat) + self.optimizer.eps)
        return total / weight, norm

    def _pass(self, ids: NDArray[np.int64]) -> tuple[float, float, Arrays]:
        rows = {name: value.astype(float) for name, value in self.source.fetch(ids).items()}
        hidden = np.tanh(rows["x"] @ self.params["hidden.weight"].T + self.params["hidden.bias"])
        error = hidden @ self.params["out.weight"].T + self.params["out.bias"] - rows["y"]
        total = float((rows["weight"] * 0.5 * (error**2).sum(axis=1)).sum())
        back = rows["weight"][:, None] * error
        inner = (back @ self.params["out.weight"]) * (1 - hidden**2)
        sums = {
            "out.weight": back.T @ hidden,
            "out.bias": back.sum(axis=0),
            "hidden.weight": inner.T @ rows["x"],
            "hidden.bias": inner.sum(axis=0),
        }
        return total, float(rows["weight"].sum()), sums
