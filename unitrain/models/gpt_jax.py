"""The GPT of models/config.py in Flax NNX, and how to sample from it: the twin of gpt_torch.py.

Kernels are as NNX has them, inputs first, and those of attention have an axis for heads: a mesh that shards it gives
each device whole heads, where the canonical matrix would be cut through queries, keys and values alike.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .config import GPT
from .layout import TRANSPOSED, Layout, Rule, Turn

_BLOCK = r"(blocks\.\d+\."
_LAYOUT = Layout(
    Rule(r"(embed)\.embedding", r"\1.weight"),
    Rule(_BLOCK + r"attention\.qkv)\.kernel", r"\1.weight", Turn((1, 2, 3, 0), (3, 1))),
    Rule(_BLOCK + r"attention\.out)\.kernel", r"\1.weight", Turn((2, 0, 1), (1, 2))),
    Rule(_BLOCK + r"mlp\.(?:gate|up|down))\.kernel", r"\1.weight", TRANSPOSED),
    Rule(r"(head)\.kernel", r"\1.weight", TRANSPOSED),
    Rule(r"((?:blocks\.\d+\.(?:attention|mlp)_)?norm)\.scale", r"\1.weight"),
)


class GPTModule(nnx.Module):
    """Tokens (rows, seq), whole numbers, to logits (rows, seq, vocab)."""

    layout = _LAYOUT
    # canonical name -> the axis of the NNX variable that a `tensor` mesh axis shards (Shoeybi et al., "Megatron-LM",
    # 2019: what comes out of the first matrices goes, without a word to others, into the last)
    tensor_axes = (
        (r"blocks\.\d+\.attention\.qkv\.weight", 2),
        (r"blocks\.\d+\.attention\.out\.weight", 0),
        (r"blocks\.\d+\.mlp\.(gate|up)\.weight", 1),
        (r"blocks\.\d+\.mlp\.down\.weight", 0),
    )

    def __init__(self, config: GPT, *, rngs: nnx.Rngs | None = None) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        shape = config.shape()
        self.max_len = config.max_len
        self.remat = False  # True: blocks are computed again in the backward pass instead of kept
        self.embed = nnx.Embed(shape.vocab_size, shape.width, rngs=rngs)
        self.dropout = dropout(config, rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(shape.layers)])
        self.norm = RMSNorm(shape.width, config.norm_eps)
        self.head = None if config.tied else nnx.Linear(shape.width, shape.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token at each position."""
        if tokens.shape[1] > self.max_len:
            raise ValueError(f"{tokens.shape[1]} tokens in a row, but model.max_len is {self.max_len}")
        run = nnx.remat(Block.__call__) if self.remat else Block.__call__
        table = self.embed.embedding[...]  # not self.embed(tokens), which gives fp32 whatever the table is
        x = self.dropout(jnp.take(table, tokens, axis=0))
        for block in self.blocks:
            x = run(block, x)
        x = self.norm(x)
        return x @ table.T if self.head is None else self.head(x)


class Block(nnx.Module):
    """Attention, then a feed-forward part, each added to the residual stream."""

    def __init__(self, config: GPT, rngs: nnx.Rngs) -> None:
        width = config.shape().width
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        self.mlp = SwiGLU(width, config.shape().ffn, rngs)
        self.dropout = dropout(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(rows, seq, width) to the same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Attention(nnx.Module):
    """Causal self-attention over rotated queries and keys."""

    def __init__(self, config: GPT, rngs: nnx.Rngs) -> None:
        shape = config.shape()
        heads, features = shape.heads, shape.width // shape.heads
        self.theta = config.rope_theta
        self.qkv = nnx.LinearGeneral(shape.width, (3, heads, features), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((heads, features), shape.width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.dropout = dropout(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(rows, seq, width) to the same shape."""
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)  # each (rows, seq, heads, features of a head)
        q, k = rotated(q, self.theta), rotated(k, self.theta)
        if self.dropout.rate == 0 or self.dropout.deterministic:
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = self._with_dropout(q, k, v)
        joined: jax.Array = self.out(mixed)
        return joined

    def _with_dropout(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attention that forgets some of its weights, as torch's does."""
        scores = jnp.einsum("rqhf,rkhf->rhqk", q, k, preferred_element_type=jnp.float32) / np.sqrt(q.shape[-1])
        seen = jnp.tril(jnp.ones(scores.shape[-2:], dtype=bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("rhqk,rkhf->rqhf", self.dropout(weights), v)


class SwiGLU(nnx.Module):
    """Shazeer, "GLU Variants Improve Transformer", 2020."""

    def __init__(self, width: int, ffn: int, rngs: nnx.Rngs) -> None:
        self.gate = nnx.Linear(width, ffn, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, ffn, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(ffn, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) to the same shape."""
        down: jax.Array = self.down(nnx.silu(self.gate(x)) * self.up(x))
        return down


class RMSNorm(nnx.Module):
    """Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; in fp32 whatever the input is."""

    def __init__(self, width: int, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) to the same shape and dtype."""
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        return (normal * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def dropout(config: GPT, rngs: nnx.Rngs) -> nnx.Dropout:
    """A dropout with a stream of random numbers of its own, or none where nothing is dropped."""
    return nnx.Dropout(config.dropout, rngs=rngs if config.dropout else None)


def rotated(x: jax.Array, theta: float) -> jax.Array:
    """RoPE (Su et al., "RoFormer", 2021) on (..., seq, heads, features): feature i turns with feature i + half."""
    seq, _, features = x.shape[-3:]
    speeds = theta ** -(jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    angles = jnp.outer(jnp.arange(seq, dtype=jnp.float32), speeds)[:, None]  # the same for all heads
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)


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
    number of devices. All of it is one program, compiled once: the window slides over a row that has room for all.
    """
    length = len(prompt) + num_tokens
    width = length if window is None else min(window, length)

    def go_on(model: Any, row: Any) -> Any:
        key = jax.random.key(seed)

        def step(place: jax.Array, row: jax.Array) -> jax.Array:
            begin = jnp.maximum(place - width, 0)
            # Behind `place` stand zeros, which a causal model does not look at.
            logits = model(jax.lax.dynamic_slice_in_dim(row, begin, width)[None])[0, place - begin - 1]
            logits = logits.astype(jnp.float32)
            if temperature == 0:
                chosen = jnp.argmax(logits)
            else:
                chosen = jax.random.categorical(jax.random.fold_in(key, place), logits / temperature)
            return row.at[place].set(chosen)

        return jax.lax.fori_loop(len(prompt), length, step, row)

    row = np.zeros(length, dtype=np.int32)
    row[: len(prompt)] = prompt
    if isinstance(model, nnx.Module):
        found = nnx.jit(go_on)(model, row)
    else:  # a function, whose values are its own
        found = jax.jit(functools.partial(go_on, model))(row)
    tokens: list[int] = np.asarray(found).tolist()
    return tokens
