"""What a traced loss is in JAX: its sums, and which parameters lead to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from unitrain.errors import UserError
from unitrain.losses import ArrayKind

ARRAYS = ArrayKind("jax.Array", lambda value: isinstance(value, Array | np.ndarray | np.generic))


def pair(amount: Any, weight: Any) -> Array:
    """[sum, weight] in fp32."""
    return jnp.stack([jnp.asarray(amount, jnp.float32), jnp.asarray(weight, jnp.float32)])


def reached_by(loss: Callable[[list[Array]], Array], trained: list[Array], name: str) -> list[bool]:
    """Which trained parameters a loss depends on; JAX gives the others a gradient of zero, and no sign.

    Raises UserError where it is none.
    """
    graph = jax.make_jaxpr(loss)(trained).jaxpr
    needed = {id(variable) for variable in graph.outvars}
    for step in reversed(graph.eqns):
        if any(id(variable) in needed for variable in step.outvars):
            needed.update(id(variable) for variable in step.invars)
    reached = [id(variable) in needed for variable in graph.invars]
    if not any(reached):
        raise UserError(
            f"the loss function {name!r} returned a loss that no trainable parameter leads to; compute it from the "
            "model's output"
        )
    return reached
