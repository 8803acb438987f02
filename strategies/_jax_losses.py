"""What a loss function may return in JAX, and what is said where it returns something else."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from unitrain.errors import UserError
from unitrain.strategy import Loss


def as_loss(found: Any, rows: int, name: str) -> Loss:
    """What a loss function returned, as (sum, weight): a plain scalar is a mean over the rows it saw."""
    loss = found
    if isinstance(found, Array) and not found.ndim:
        loss = Loss(found * rows, rows)
    if not isinstance(loss, Loss) or not isinstance(loss.sum, Array) or loss.sum.ndim:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Array) else ""
        raise UserError(
            f"the loss function {name!r} returned a {_kind(found)}{shape}; return a scalar array (the mean over its "
            "rows) or unitrain.Loss(sum, weight) with a scalar sum"
        )
    _check_parts(loss, name)
    return loss


def pair(amount: Any, weight: Any) -> Array:
    """[sum, weight] in fp32."""
    return jnp.stack([jnp.asarray(amount, jnp.float32), jnp.asarray(weight, jnp.float32)])


def check_leads_to_parameters(loss: Callable[[list[Array]], Array], trained: list[Array], name: str) -> None:
    """Raise UserError for a loss that no trained parameter has any part in; JAX would call its gradient zero."""
    graph = jax.make_jaxpr(loss)(trained).jaxpr
    reached = {id(variable) for variable in graph.invars}
    for step in graph.eqns:
        if any(id(variable) in reached for variable in step.invars):
            reached.update(id(variable) for variable in step.outvars)
    if not any(id(variable) in reached for variable in graph.outvars):
        raise UserError(
            f"the loss function {name!r} returned a loss that no trainable parameter leads to; compute it from the "
            "model's output"
        )


def _check_parts(loss: Loss, name: str) -> None:
    """Raise UserError for a weight or metrics that cannot be summed, or metrics with names that are taken."""
    amounts: dict[str, Any] = {"weight": loss.weight}
    metrics: Mapping[str, Any] = loss.metrics
    for key, found in metrics.items():
        if key in ("loss", "weight", "grad_norm", "applied"):
            raise UserError(
                f"the loss function {name!r} returned a metric named {key!r}, which every step has already; rename it"
            )
        if not isinstance(found, tuple) or len(found) != 2:
            raise UserError(
                f"the loss function {name!r} returned the metric {key!r} as a {_kind(found)}; return the pair "
                "(sum, weight)"
            )
        amounts[f"sum of the metric {key!r}"], amounts[f"weight of the metric {key!r}"] = found
    for what, amount in amounts.items():
        held = isinstance(amount, Array | np.ndarray)
        if isinstance(amount, numbers.Real | np.generic) or (held and not amount.ndim):
            continue
        shape = f" of shape {tuple(amount.shape)}" if held else f", a {_kind(amount)}"
        raise UserError(f"the loss function {name!r} returned a {what}{shape}; return a scalar")


def _kind(found: Any) -> str:
    return "jax.Array" if isinstance(found, Array) else type(found).__name__
