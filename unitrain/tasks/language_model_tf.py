"""The language model's loss in TensorFlow, and how to sample from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ..strategy import Loss


def loss(task: object, model: Any, batch: Mapping[str, Any]) -> Loss:
    """Cross entropy in nats, in fp32: the sum over tokens and the number of tokens."""
    logits, targets, weight = tf.cast(model(batch["tokens"]), tf.float32), batch["targets"], batch.get("weight")
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits)
    if weight is None:
        return Loss(tf.reduce_sum(each), tf.cast(tf.size(targets), tf.float32))
    return Loss(tf.reduce_sum(each * weight), tf.reduce_sum(weight))


def generate(
    model: Any,
    prompt: Sequence[int],
    num_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    window: int | None = None,
) -> list[int]:
    """The prompt and `num_tokens` more, each drawn at the temperature (0: the likeliest) from the model's logits.

    The model, any causal one, sees the last `window` tokens (None: all). The same seed gives the same tokens on any
    device. The model is traced once: the window has one size, with zeros behind the tokens.
    """
    length = len(prompt) + num_tokens
    width = length if window is None else min(window, length)
    logits_at = tf.function(lambda seen, place: tf.cast(model(seen)[0, place], tf.float32))
    draws = np.random.Generator(np.random.Philox(key=seed))
    tokens = list(prompt)
    for _ in range(num_tokens):
        seen = tokens[-width:]
        row = np.zeros((1, width), dtype=np.int32)
        row[0, : len(seen)] = seen
        logits = logits_at(tf.constant(row), tf.constant(len(seen) - 1)).numpy().astype(np.float64)
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            chances = np.cumsum(np.exp((logits - logits.max()) / temperature))
            tokens.append(int(np.searchsorted(chances, draws.random() * chances[-1], side="right")))
    return tokens
