"""The GPT of models/config.py in PyTorch, and how to sample from it.

Parameter names are the canonical ones: embed, blocks.N.attention_norm, blocks.N.attention.qkv, .out,
blocks.N.mlp_norm, blocks.N.mlp.gate, .up, .down, norm, and head unless it is tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import GPT


class GPTModule(nn.Module):
    """Tokens (rows, seq), int64, to logits (rows, seq, vocab).

    Built on the meta device it lacks parameters alone: there are no buffers. `GPT.initial` says what they begin with.
    """

    def __init__(self, config: GPT) -> None:
        super().__init__()
        shape = config.shape()
        self.max_len = config.max_len
        self.embed = nn.Embedding(shape.vocab_size, shape.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, config.norm_eps)
        # Tied, there is no second parameter: moving a module to a device would untie two names of one tensor.
        self.head = None if config.tied else nn.Linear(shape.width, shape.vocab_size, bias=False)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits of the next token at each position.

        `segments` (rows, seq), int64: tokens look at those of their own number alone, for rows that hold several texts.
        `positions` (rows, seq), int64: where each token stands in its text.
        """
        if tokens.shape[1] > self.max_len:
            raise ValueError(f"{tokens.shape[1]} tokens in a row, but model.max_len is {self.max_len}")
        x = self.dropout(self.embed(tokens))
        layout = () if segments is None else (same_text(segments), positions)
        for block in self.blocks:
            x = block(x, *layout)
        x = self.norm(x)
        logits: Tensor = nn.functional.linear(x, self.embed.weight) if self.head is None else self.head(x)
        return logits

    def sharding_units(self) -> list[nn.Module]:
        """Submodules that a sharding strategy gathers and frees as one, in the order in which they run."""
        return list(self.blocks)


class Block(nn.Module):
    """Attention, then a feed-forward part, each added to the residual stream."""

    def __init__(self, config: GPT) -> None:
        super().__init__()
        width = config.shape().width
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        self.mlp = SwiGLU(width, config.shape().ffn)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, seen: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """(rows, seq, width) to the same shape; `seen` and `positions` as Attention has them."""
        x = x + self.dropout(self.attention(self.attention_norm(x), seen, positions))
        inner: Tensor = self.dropout(self.mlp(self.mlp_norm(x)))
        return x + inner


class Attention(nn.Module):
    """Causal self-attention over rotated queries and keys."""

    def __init__(self, config: GPT) -> None:
        super().__init__()
        shape = config.shape()
        self.heads, self.theta, self.dropout = shape.heads, config.rope_theta, config.dropout
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, seen: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """(rows, seq, width) to the same shape.

        `seen` (rows, 1, seq, seq), bool: which tokens each looks at; None: all before it. `positions`: see `rotated`.
        """
        rows, seq, width = x.shape
        qkv = self.qkv(x).view(rows, seq, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (rows, heads, seq, features of a head)
        q, k = rotated(q, self.theta, positions), rotated(k, self.theta, positions)
        dropout = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=seen is None
        )
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, seq, width))
        return joined


class SwiGLU(nn.Module):
    """Shazeer, "GLU Variants Improve Transformer", 2020."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, ffn, bias=False)
        self.up = nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        down: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return down


class RMSNorm(nn.Module):
    """Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; in fp32 whatever the input is."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape and dtype."""
        return nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def same_text(segments: Tensor) -> Tensor:
    """(rows, 1, seq, seq), bool, of segments (rows, seq): which tokens are of the same text, and not behind."""
    seq = segments.shape[1]
    before = torch.ones(seq, seq, dtype=torch.bool, device=segments.device).tril()
    return ((segments[:, :, None] == segments[:, None, :]) & before)[:, None]


def rotated(x: Tensor, theta: float, positions: Tensor | None = None) -> Tensor:
    """RoPE (Su et al., "RoFormer", 2021) on (..., seq, features): feature i turns together with feature i + half.

    `positions` (rows, seq) of x (rows, heads, seq, features); None: they count from 0. The angles are made anew, in
    fp32: a cached table would have no values on the meta device, and a table handed from block to block would be
    rounded by strategies that cast a block's inputs.
    """
    seq, features = x.shape[-2:]
    speeds = theta ** -(torch.arange(0, features, 2, device=x.device, dtype=torch.float32) / features)
    if positions is None:
        angles = torch.outer(torch.arange(seq, device=x.device, dtype=torch.float32), speeds)
    else:
        angles = (positions[..., None].float() * speeds)[:, None]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Sequence[int],
    num_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    window: int | None = None,
) -> list[int]:
    """The prompt and `num_tokens` more, each drawn at the temperature (0: the likeliest) from the model's logits.

    The model sees the last `window` tokens (None: all). The same seed gives the same tokens on any device.
    """
    device = next(model.parameters()).device
    draws = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        seen = torch.tensor([tokens if window is None else tokens[-window:]], device=device)
        logits = logits_of(model(seen))[0, -1].float().cpu()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            chances = torch.softmax(logits / temperature, dim=-1)
            tokens.append(int(torch.multinomial(chances, 1, generator=draws)))
    return tokens


def logits_of(output: Any) -> Tensor:
    """Logits of whatever a model returned: models of transformers return an object that has them."""
    logits: Tensor = getattr(output, "logits", output)
    return logits
