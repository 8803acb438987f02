"""The classifier's loss in JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..strategy import Loss


def loss(task: object, model: Any, batch: Mapping[str, jax.Array]) -> Loss:
    """Cross entropy in nats, in fp32, summed over rows; also the share of rows that are classified correctly."""
    logits, classes = model(batch["x"]).astype(jnp.float32), batch["y"]
    correct = (logits.argmax(axis=1) == classes).sum()
    return Loss(cross_entropy(logits, classes).sum(), len(classes), {"accuracy": (correct, len(classes))})


def cross_entropy(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Of logits (..., classes) and the class that is right (...): nats, (...)."""
    right = jnp.take_along_axis(logits, classes[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right
