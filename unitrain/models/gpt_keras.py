"""The GPT of models/config.py in Keras 3, on any of its backends: the twin of gpt_torch.py."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from .config import GPT
from .layout import TRANSPOSED, Layout, Rule

Tensor = Any  # of the backend


class GPTModule(keras.Model):  # type: ignore[misc]  # Keras has no types
    """Tokens (rows, seq), whole numbers, to logits (rows, seq, vocab)."""

    layout = Layout(
        Rule(r"embed/embeddings", "embed.weight"),
        Rule(r"blocks_(\d+)/(attention|mlp)/(\w+)/kernel", r"blocks.\1.\2.\3.weight", TRANSPOSED),
        Rule(r"blocks_(\d+)/((?:attention|mlp)_norm)/weight", r"blocks.\1.\2.weight"),
        Rule(r"norm/weight", "norm.weight"),
        Rule(r"head/kernel", "head.weight", TRANSPOSED),
    )

    def __init__(self, config: GPT) -> None:
        super().__init__(name="gpt")
        shape = config.shape()
        self.max_len = config.max_len
        self.embed = keras.layers.Embedding(shape.vocab_size, shape.width, name="embed")
        self.dropout = keras.layers.Dropout(config.dropout, name="dropout")
        self.blocks = [Block(config, name=f"blocks_{number}") for number in range(shape.layers)]
        self.norm = RMSNorm(config.norm_eps, name="norm")
        self.head = None if config.tied else linear(shape.vocab_size, name="head")
        self.build((None, None))

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make all variables; in `build`, for their paths begin with the paths of what builds them."""
        self.embed.build(input_shape)
        inner = (*input_shape, self.embed.output_dim)
        for layer in (*self.blocks, self.norm, *([] if self.head is None else [self.head])):
            layer.build(inner)

    def call(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at each position."""
        if tokens.shape[1] is not None and tokens.shape[1] > self.max_len:
            raise ValueError(f"{tokens.shape[1]} tokens in a row, but model.max_len is {self.max_len}")
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.head is not None:
            return self.head(x)
        return ops.matmul(x, ops.transpose(ops.cast(self.embed.embeddings, x.dtype)))


class Block(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Attention, then a feed-forward part, each added to the residual stream."""

    def __init__(self, config: GPT, **options: Any) -> None:
        super().__init__(**options)
        self.attention_norm = RMSNorm(config.norm_eps, name="attention_norm")
        self.attention = Attention(config, name="attention")
        self.mlp_norm = RMSNorm(config.norm_eps, name="mlp_norm")
        self.mlp = SwiGLU(config.shape().ffn, name="mlp")
        self.dropout = keras.layers.Dropout(config.dropout, name="dropout")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """See keras.Layer."""
        for layer in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            layer.build(input_shape)

    def call(self, x: Tensor) -> Tensor:
        """(rows, seq, width) to the same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Attention(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Causal self-attention over rotated queries and keys."""

    def __init__(self, config: GPT, **options: Any) -> None:
        super().__init__(**options)
        shape = config.shape()
        self.heads, self.theta = shape.heads, config.rope_theta
        self.qkv = linear(3 * shape.width, name="qkv")
        self.out = linear(shape.width, name="out")
        self.dropout = keras.layers.Dropout(config.dropout, name="dropout")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """See keras.Layer."""
        self.qkv.build(input_shape)
        self.out.build(input_shape)

    def call(self, x: Tensor) -> Tensor:
        """(rows, seq, width) to the same shape."""
        rows, seq, width = ops.shape(x)
        features = x.shape[-1] // self.heads
        split = ops.reshape(self.qkv(x), (rows, seq, 3, self.heads, features))
        q, k, v = ops.unstack(ops.transpose(split, (2, 0, 3, 1, 4)), 3)  # each (rows, heads, seq, features of a head)
        q, k = rotated(q, self.theta), rotated(k, self.theta)
        scores = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2)))
        scores = ops.cast(scores, "float32") * features**-0.5
        places = ops.arange(seq)
        seen = ops.expand_dims(places, 1) >= ops.expand_dims(places, 0)
        weights = ops.softmax(ops.where(seen, scores, float("-inf")), axis=-1)
        mixed = ops.matmul(self.dropout(ops.cast(weights, v.dtype)), v)
        return self.out(ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (rows, seq, width)))


class SwiGLU(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Shazeer, "GLU Variants Improve Transformer", 2020."""

    def __init__(self, ffn: int, **options: Any) -> None:
        super().__init__(**options)
        self.ffn = ffn
        self.gate, self.up = linear(ffn, name="gate"), linear(ffn, name="up")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """See keras.Layer."""
        width = input_shape[-1]
        assert width is not None, "the model says how wide it is"
        self.down = linear(width, name="down")
        self.gate.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.ffn))

    def call(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return self.down(ops.silu(self.gate(x)) * self.up(x))


class RMSNorm(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; in fp32 whatever the input is."""

    def __init__(self, eps: float, **options: Any) -> None:
        super().__init__(**options)
        self.eps = eps

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """See keras.Layer."""
        self.weight = self.add_weight(name="weight", shape=input_shape[-1:], initializer="ones", autocast=False)

    def call(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape and dtype."""
        wide = ops.cast(x, "float32")
        scale = ops.rsqrt(ops.mean(ops.square(wide), axis=-1, keepdims=True) + self.eps)
        return ops.cast(wide * scale * self.weight, x.dtype)


def linear(outputs: int, name: str) -> Any:
    """A matrix without a bias."""
    return keras.layers.Dense(outputs, use_bias=False, name=name)


def rotated(x: Tensor, theta: float) -> Tensor:
    """RoPE (Su et al., "RoFormer", 2021) on (..., seq, features): feature i turns together with feature i + half."""
    features = x.shape[-1]
    places = ops.arange(ops.shape(x)[-2], dtype="float32")
    speeds = ops.power(float(theta), -(ops.arange(0, features, 2, dtype="float32") / features))
    angles = ops.outer(places, speeds)
    cos, sin = ops.cos(angles), ops.sin(angles)
    first, second = (ops.cast(half, "float32") for half in ops.split(x, 2, axis=-1))
    return ops.cast(ops.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1), x.dtype)
