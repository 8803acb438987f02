"""The classifier's loss in TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from ..strategy import Loss


def loss(task: object, model: Any, batch: Mapping[str, Any]) -> Loss:
    """Cross entropy in nats, in fp32, summed over rows; also the share of rows that are classified correctly."""
    logits, classes = tf.cast(model(batch["x"]), tf.float32), batch["y"]
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=classes, logits=logits)
    right = tf.cast(tf.argmax(logits, axis=1, output_type=classes.dtype) == classes, tf.float32)
    rows = tf.cast(tf.size(classes), tf.float32)
    return Loss(tf.reduce_sum(each), rows, {"accuracy": (tf.reduce_sum(right), rows)})
