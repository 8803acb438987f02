"""The toy problem of the conformance suite in Flax NNX."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from unitrain.models.layout import TRANSPOSED, Layout, Rule
from unitrain.strategy import Loss

from .toy import NUM_HIDDEN, NUM_IN, NUM_OUT


class ToyModel(nnx.Module):
    """Two linear layers with a tanh between; weights have inputs first, as NNX has them."""

    layout = Layout(Rule(r"(hidden|out)\.kernel", r"\1.weight", TRANSPOSED), Rule(r"(hidden|out)\.bias", r"\1.bias"))

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(NUM_IN, NUM_HIDDEN, rngs=rngs)
        self.out = nnx.Linear(NUM_HIDDEN, NUM_OUT, rngs=rngs)
        self.deterministic = False  # what NNX sets in evaluation mode

    def __call__(self, x: jax.Array) -> jax.Array:
        """(rows, 6) -> (rows, 3)."""
        output: jax.Array = self.out(jnp.tanh(self.hidden(x)))
        return output


def toy_loss(model: ToyModel, batch: Mapping[str, jax.Array]) -> Loss:
    """Weighted squared error; also counts rows as a metric."""
    error = 0.5 * jnp.square(model(batch["x"]) - batch["y"]).sum(axis=1)
    rows = (batch["weight"] != 0).sum()
    return Loss((batch["weight"] * error).sum(), batch["weight"].sum(), {"counted": (rows, len(error))})


def probe(model: ToyModel) -> tuple[list[float], bool]:
    """A forward pass over fixed rows, and whether the model was in training mode."""
    x = jnp.linspace(-1, 1, 2 * NUM_IN).reshape(2, NUM_IN)
    return model(x).flatten().tolist(), not model.deterministic
