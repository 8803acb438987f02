"""The ConvNet of models/config.py in Keras 3, on any of its backends, channels last inside: the twin of
convnet_torch.py.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from .config import ConvNet
from .layout import CONV2D, TRANSPOSED, Layout, Rule

Tensor = Any  # of the backend


class ConvNetModule(keras.Model):  # type: ignore[misc]  # Keras has no types
    """Images (rows, channels, height, width), or (rows, height, width) of one channel, to logits (rows, classes)."""

    layout = Layout(
        Rule(r"stem/kernel", "stem.weight", CONV2D),
        Rule(r"blocks_(\d+)/(conv[12])/kernel", r"blocks.\1.\2.weight", CONV2D),
        *(
            Rule(rf"{native}/{own}", rf"{canonical}.{torch}")
            for native, canonical in ((r"blocks_(\d+)/(norm[12])", r"blocks.\1.\2"), ("norm", "norm"))
            for own, torch in (
                ("gamma", "weight"),
                ("beta", "bias"),
                ("moving_mean", "running_mean"),
                ("moving_variance", "running_var"),
                ("count", "num_batches_tracked"),
            )
        ),
        Rule(r"head/kernel", "head.weight", TRANSPOSED),
        Rule(r"head/bias", "head.bias"),
    )

    def __init__(self, config: ConvNet) -> None:
        super().__init__(name="convnet")
        self.config = config
        self.stem = convolution(config, name="stem")
        self.blocks = [Block(config, name=f"blocks_{number}") for number in range(config.depth)]
        self.norm = normalisation(config, name="norm")
        self.head = keras.layers.Dense(config.num_classes, name="head")
        self.build((None, None, None, config.in_channels))

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make all variables; in `build`, for their paths begin with the paths of what builds them."""
        self.stem.build(input_shape)
        inner = (*input_shape[:-1], self.config.channels)
        for layer in (*self.blocks, self.norm):
            layer.build(inner)
        self.head.build((None, self.config.channels))

    def call(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        x = ops.expand_dims(x, -1) if len(x.shape) == 3 else ops.transpose(x, (0, 2, 3, 1))
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(ops.mean(ops.silu(self.norm(x)), axis=(1, 2)))


class Block(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """He et al., "Identity Mappings in Deep Residual Networks", 2016: normalise first, add last."""

    def __init__(self, config: ConvNet, **options: Any) -> None:
        super().__init__(**options)
        self.norm1, self.conv1 = normalisation(config, name="norm1"), convolution(config, name="conv1")
        self.norm2, self.conv2 = normalisation(config, name="norm2"), convolution(config, name="conv2")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """See keras.Layer."""
        for layer in (self.norm1, self.conv1, self.norm2, self.conv2):
            layer.build(input_shape)

    def call(self, x: Tensor) -> Tensor:
        """(rows, height, width, channels) to the same shape."""
        inner = self.conv1(ops.silu(self.norm1(x)))
        return x + self.conv2(ops.silu(self.norm2(inner)))


class BatchNorm(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Ioffe and Szegedy, "Batch Normalization", 2015, with torch's statistics.

    Keras's own keeps the variance of the sample and does not count: its checkpoints would be no torch model's.
    """

    def __init__(self, momentum: float = 0.1, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(**options)
        self.momentum, self.eps = momentum, eps

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """See keras.Layer."""
        shape = input_shape[-1:]
        self.gamma = self.add_weight(name="gamma", shape=shape, initializer="ones", autocast=False)
        self.beta = self.add_weight(name="beta", shape=shape, initializer="zeros", autocast=False)
        kept: dict[str, Any] = {"trainable": False, "autocast": False}
        self.moving_mean = self.add_weight(name="moving_mean", shape=shape, initializer="zeros", **kept)
        self.moving_variance = self.add_weight(name="moving_variance", shape=shape, initializer="ones", **kept)
        self.count = self.add_weight(name="count", shape=(), initializer="zeros", dtype="int32", **kept)

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        """(..., channels) to the same shape and dtype, in fp32."""
        wide = ops.cast(x, "float32")
        if training:
            axes = tuple(range(len(x.shape) - 1))
            mean, variance = ops.mean(wide, axis=axes), ops.var(wide, axis=axes)
            number = ops.cast(ops.size(wide) // x.shape[-1], "float32")
            # The variance of all that the sample stands for, as torch keeps it.
            unbiased = variance * (number / ops.maximum(number - 1, 1))
            for held, new in ((self.moving_mean, mean), (self.moving_variance, unbiased)):
                held.assign((1 - self.momentum) * held + self.momentum * ops.stop_gradient(new))
            self.count.assign(self.count + 1)
        else:
            mean, variance = self.moving_mean, self.moving_variance
        scale = self.gamma * ops.rsqrt(variance + self.eps)
        return ops.cast((wide - mean) * scale + self.beta, x.dtype)


def convolution(config: ConvNet, name: str) -> Any:
    """3 x 3, as large an image out as in."""
    return keras.layers.Conv2D(
        config.channels, 3, padding="same", use_bias=False, data_format="channels_last", name=name
    )


def normalisation(config: ConvNet, name: str) -> Any:
    """Over groups of channels of one image, or over the images that one rank sees at once."""
    if config.norm == "batch":
        return BatchNorm(name=name)
    return keras.layers.GroupNormalization(config.groups(), axis=-1, epsilon=1e-5, name=name)
