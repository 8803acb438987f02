"""What a loss function may return, and what is said where it returns something else; alike in every framework."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .errors import UserError
from .strategy import Loss

EVERY_STEP_HAS = ("loss", "weight", "grad_norm", "applied")  # no metric may take these names


class ArrayKind(NamedTuple):
    """The arrays of a framework."""

    name: str  # as users know it: `Tensor`, `jax.Array`
    is_one: Callable[[Any], bool]


def as_loss(found: Any, rows: int, name: str, arrays: ArrayKind) -> Loss:
    """What the loss function `name` returned, as (sum, weight): a plain scalar is a mean over the rows it saw.

    Raises UserError for anything else.
    """
    loss = found
    if arrays.is_one(found) and _scalar(found):
        loss = Loss(found * rows, rows)
    if not isinstance(loss, Loss) or not arrays.is_one(loss.sum) or not _scalar(loss.sum):
        raise UserError(
            f"the loss function {name!r} returned a {_described(found, arrays)}; return a scalar tensor (the mean "
            "over its rows) or unitrain.Loss(sum, weight) with a scalar sum"
        )
    return loss


def check_parts(loss: Loss, name: str, arrays: ArrayKind) -> None:
    """Raise UserError for a weight or metrics that cannot be summed, or metrics with names that are taken."""
    for what, amount in _amounts(loss, name):
        if arrays.is_one(amount):
            if not _scalar(amount):
                raise UserError(
                    f"the loss function {name!r} returned a {what} of shape {tuple(amount.shape)}; return a scalar"
                )
        elif not isinstance(amount, numbers.Real):
            raise UserError(f"the loss function {name!r} returned a {what}, a {type(amount).__name__}; return a scalar")


def _amounts(loss: Loss, name: str) -> Iterator[tuple[str, Any]]:
    """Everything of a loss that is summed, but the sum itself, and what it is called."""
    yield "weight", loss.weight
    for key, pair in loss.metrics.items():
        if key in EVERY_STEP_HAS:
            raise UserError(
                f"the loss function {name!r} returned a metric named {key!r}, which every step has already; rename it"
            )
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UserError(
                f"the loss function {name!r} returned the metric {key!r} as a {type(pair).__name__}; return the pair "
                "(sum, weight)"
            )
        yield f"sum of the metric {key!r}", pair[0]
        yield f"weight of the metric {key!r}", pair[1]


def _scalar(array: Any) -> bool:
    return bool(array.shape == ())


def _described(found: Any, arrays: ArrayKind) -> str:
    return f"{arrays.name} of shape {tuple(found.shape)}" if arrays.is_one(found) else type(found).__name__
