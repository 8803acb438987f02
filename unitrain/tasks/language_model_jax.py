"""The language model's loss in JAX, and how to sample from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..models.gpt_jax import generate as generate
from ..strategy import Loss
from .classification_jax import cross_entropy


def loss(task: object, model: Any, batch: Mapping[str, jax.Array]) -> Loss:
    """Cross entropy in nats, in fp32: the sum over tokens and the number of tokens."""
    each = cross_entropy(model(batch["tokens"]).astype(jnp.float32), batch["targets"])
    weight = batch.get("weight")
    if weight is None:
        return Loss(each.sum(), each.size)
    return Loss((each * weight).sum(), weight.sum())
