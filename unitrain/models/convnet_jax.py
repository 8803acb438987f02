"""The ConvNet of models/config.py in Flax NNX, channels last inside: the twin of convnet_torch.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from .config import ConvNet
from .layout import CONV2D, TRANSPOSED, Layout, Rule

_NORM = r"((?:blocks\.\d+\.)?norm[12]?)"


class ConvNetModule(nnx.Module):
    """Images (rows, channels, height, width), or (rows, height, width) of one channel, to logits (rows, classes)."""

    layout = Layout(
        Rule(r"(stem|blocks\.\d+\.conv[12])\.kernel", r"\1.weight", CONV2D),
        Rule(r"(head)\.kernel", r"\1.weight", TRANSPOSED),
        Rule(r"(head)\.bias", r"\1.bias"),
        Rule(_NORM + r"\.scale", r"\1.weight"),
        Rule(_NORM + r"\.bias", r"\1.bias"),
        Rule(_NORM + r"\.mean", r"\1.running_mean"),
        Rule(_NORM + r"\.var", r"\1.running_var"),
        Rule(_NORM + r"\.count", r"\1.num_batches_tracked"),
    )

    def __init__(self, config: ConvNet, *, rngs: nnx.Rngs | None = None) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.remat = False  # True: blocks are computed again in the backward pass instead of kept
        self.stem = convolution(config.in_channels, config.channels, rngs)
        self.blocks = nnx.List(Block(config, rngs) for _ in range(config.depth))
        self.norm = normalisation(config, rngs)
        self.head = nnx.Linear(config.channels, config.num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of the classes."""
        x = x[:, None] if x.ndim == 3 else x
        # What NNX is given in fp32 it computes in fp32, even with weights in bf16.
        x = self.stem(jnp.moveaxis(x, 1, -1).astype(self.stem.kernel.dtype))
        run = nnx.remat(Block.__call__) if self.remat else Block.__call__
        for block in self.blocks:
            x = run(block, x)
        logits: jax.Array = self.head(nnx.silu(self.norm(x)).mean(axis=(1, 2)))
        return logits


class Block(nnx.Module):
    """He et al., "Identity Mappings in Deep Residual Networks", 2016: normalise first, add last."""

    def __init__(self, config: ConvNet, rngs: nnx.Rngs) -> None:
        self.norm1 = normalisation(config, rngs)
        self.conv1 = convolution(config.channels, config.channels, rngs)
        self.norm2 = normalisation(config, rngs)
        self.conv2 = convolution(config.channels, config.channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(rows, height, width, channels) to the same shape."""
        inner = self.conv1(nnx.silu(self.norm1(x)))
        inner = self.conv2(nnx.silu(self.norm2(inner)))
        return x + inner


class BatchNorm(nnx.Module):
    """Ioffe and Szegedy, "Batch Normalization", 2015, with torch's statistics.

    NNX's own keeps the variance of the sample and does not count: its checkpoints would be no torch model's.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        self.momentum, self.eps = momentum, eps
        self.use_running_average = False  # what Module.train() and .eval() set
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(channels)), nnx.BatchStat(jnp.ones(channels))
        self.count = nnx.BatchStat(jnp.zeros((), dtype=jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., channels) to the same shape and dtype, in fp32."""
        wide = x.astype(jnp.float32)
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            axes, number = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            mean, var = wide.mean(axis=axes), wide.var(axis=axes)
            # The variance of all that the sample stands for, as torch keeps it.
            for kept, new in ((self.mean, mean), (self.var, var * (number / max(number - 1, 1)))):
                kept[...] = (1 - self.momentum) * kept[...] + self.momentum * jax.lax.stop_gradient(new)
            self.count[...] += 1
        scale = self.scale[...].astype(jnp.float32) * jax.lax.rsqrt(var + self.eps)
        return ((wide - mean) * scale + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def convolution(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Conv:
    """3 x 3, as large an image out as in."""
    return nnx.Conv(inputs, outputs, (3, 3), padding=1, use_bias=False, rngs=rngs)


def normalisation(config: ConvNet, rngs: nnx.Rngs) -> nnx.Module:
    """Over groups of channels of one image, or over the images that one rank sees at once."""
    if config.norm == "batch":
        return BatchNorm(config.channels)
    # The fast variance, E[x^2] - E[x]^2, loses digits that torch keeps.
    return nnx.GroupNorm(config.channels, config.groups(), epsilon=1e-5, use_fast_variance=False, rngs=rngs)
