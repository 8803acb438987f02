"""Options of the built-in models, as `model:` in a recipe spells them, and all that follows without a framework:
shapes, parameter counts, FLOPs and initial weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError
from ..recipe import above, at_least, key, one_of
from .initial import Initial, by_name, constant, fan_in_normal, normal


@dataclass(frozen=True, kw_only=True)
class GPT:
    """A decoder-only transformer: RMSNorm before each part, RoPE, SwiGLU, no biases."""

    modules: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "torch": "unitrain.models.gpt_torch:GPTModule",
            "jax": "unitrain.models.gpt_jax:GPTModule",
            "tensorflow": "unitrain.models.gpt_keras:GPTModule",
        }
    )

    size: str = key("tiny", "`tiny` (1 million parameters on bytes), `small` (14 million), `124m` or `1b`")
    layers: int | None = key(None, "transformer blocks; null: as the size has them")
    width: int | None = key(None, "features of a token; null: as the size has them")
    heads: int | None = key(None, "attention heads, a divisor of the width; null: as the size has them")
    ffn: int | None = key(None, "features inside the feed-forward part; null: as the size has them")
    vocab_size: int | None = key(None, "tokens that the model knows; null: as many as the data has")
    tied: bool = key(True, "the output layer shares the weights of the embedding")
    max_len: int = key(2048, "longest sequence that the model accepts")
    rope_theta: float = key(10000.0, "base of the rotary position embedding's wavelengths")
    dropout: float = key(0.0, "share of features dropped in training, in attention and after each part")
    norm_eps: float = key(1e-5, "RMSNorm's term under the square root")

    def __post_init__(self) -> None:
        one_of("model.size", self.size, tuple(SIZES))
        for name in ("layers", "width", "heads", "ffn", "vocab_size"):
            value = getattr(self, name)
            if value is not None:
                at_least(f"model.{name}", value, 1)
        at_least("model.max_len", self.max_len, 1)
        above("model.rope_theta", self.rope_theta, 0)
        above("model.norm_eps", self.norm_eps, 0)
        share("model.dropout", self.dropout)
        width, heads = self._dimension("width"), self._dimension("heads")
        if width % heads or width // heads % 2:
            raise RecipeError(
                f"model.width is {width} and model.heads is {heads}; width / heads must be an even whole number"
            )

    def with_vocabulary(self, num_tokens: int) -> GPT:
        """The same model with room for the data's tokens. Raises RecipeError when it was given less."""
        if self.vocab_size is None:
            return dataclasses.replace(self, vocab_size=num_tokens)
        if self.vocab_size < num_tokens:
            raise RecipeError(
                f"model.vocab_size is {self.vocab_size}, but the data has {num_tokens} tokens; "
                f"use at least {num_tokens}, or null for the data's own"
            )
        return self

    def shape(self) -> GPTShape:
        """Every dimension, with the size's own where none was given. Raises RecipeError without a vocabulary."""
        if self.vocab_size is None:
            raise RecipeError("model.vocab_size is null and no data says how many tokens there are; give it a number")
        return GPTShape(
            layers=self._dimension("layers"),
            width=self._dimension("width"),
            heads=self._dimension("heads"),
            ffn=self._dimension("ffn"),
            vocab_size=self.vocab_size,
        )

    def num_parameters(self) -> int:
        """Exactly as many numbers as training moves."""
        shape = self.shape()
        tables = shape.vocab_size * shape.width * (1 if self.tied else 2)
        return tables + shape.layers * _block_matrices(shape) + (2 * shape.layers + 1) * shape.width

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs of one token, forward and backward: 6 N + 12 layers width seq_len.

        Chowdhery et al., "PaLM", 2022, appendix B: no credit for skipping the masked half of attention, nor for
        recomputation. N leaves out an embedding of its own (untied), which is looked up and not multiplied.
        """
        shape = self.shape()
        looked_up = 0 if self.tied else shape.vocab_size * shape.width
        return 6.0 * (self.num_parameters() - looked_up) + 12.0 * shape.layers * shape.width * seq_len

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """The first value of a parameter.

        Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019: std 0.02, and less
        for what adds to the residual stream, so that its variance does not grow with the depth.
        """
        rules: dict[str, Initial] = {
            r"blocks\.\d+\.(attention\.out|mlp\.down)\.weight": normal(0.02 / math.sqrt(2 * self._dimension("layers"))),
            r"blocks\.\d+\.(attention\.qkv|mlp\.gate|mlp\.up)\.weight": normal(0.02),
            r"(embed|head)\.weight": normal(0.02),
            r"(blocks\.\d+\.(attention|mlp)_)?norm\.weight": constant(1),
        }
        return by_name(rules)(name, shape, seed)

    def _dimension(self, name: str) -> int:
        given: int | None = getattr(self, name)
        return SIZES[self.size][name] if given is None else given


@dataclass(frozen=True, kw_only=True)
class GPTShape:
    """The dimensions of a GPT."""

    layers: int
    width: int
    heads: int
    ffn: int
    vocab_size: int


# feed-forward widths are near 8/3 of the width, where SwiGLU's three matrices cost what two of 4 x width would
SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType({
    "tiny": {"layers": 3, "width": 160, "heads": 4, "ffn": 448},
    "small": {"layers": 8, "width": 384, "heads": 6, "ffn": 1024},
    "124m": {"layers": 12, "width": 768, "heads": 12, "ffn": 2048},
    "1b": {"layers": 20, "width": 2048, "heads": 16, "ffn": 5632},
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Fully connected layers with ReLU between them."""

    modules: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "torch": "unitrain.models.mlp_torch:MLPModule",
            "jax": "unitrain.models.mlp_jax:MLPModule",
            "tensorflow": "unitrain.models.mlp_keras:MLPModule",
        }
    )

    in_features: int = key(64, "numbers of one sample, whatever their arrangement")
    hidden: tuple[int, ...] = key((128, 128), "widths of the hidden layers, first to last; []: a linear model")
    num_classes: int = key(10, "outputs")
    dropout: float = key(0.0, "share of hidden features dropped in training")

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))  # YAML gives a list
        at_least("model.in_features", self.in_features, 1)
        at_least("model.num_classes", self.num_classes, 1)
        for number, width in enumerate(self.hidden):
            at_least(f"model.hidden[{number}]", width, 1)
        share("model.dropout", self.dropout)

    def check_sample(self, shape: tuple[int, ...]) -> None:
        """Raise RecipeError where samples of that shape do not fit."""
        if math.prod(shape) != self.in_features:
            raise RecipeError(
                f"model.in_features is {self.in_features}, but a sample of the data has {math.prod(shape)}; "
                f"use in_features: {math.prod(shape)}"
            )

    def num_parameters(self) -> int:
        """Exactly as many numbers as training moves."""
        widths = (self.in_features, *self.hidden, self.num_classes)
        return sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """The first value of a parameter: He et al., 2015."""
        rules: dict[str, Initial] = {
            r"layers\.\d+\.weight": fan_in_normal(math.sqrt(2)),
            r"head\.weight": fan_in_normal(1),
            r"(layers\.\d+|head)\.bias": constant(0),
        }
        return by_name(rules)(name, shape, seed)


@dataclass(frozen=True, kw_only=True)
class ConvNet:
    """A small residual convolutional network: each convolution after a norm, the image's mean, a linear layer.

    SiLU and not ReLU: at ReLU's kink a difference in the last bit becomes one of the whole gradient.
    """

    modules: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "torch": "unitrain.models.convnet_torch:ConvNetModule",
            "jax": "unitrain.models.convnet_jax:ConvNetModule",
            "tensorflow": "unitrain.models.convnet_keras:ConvNetModule",
        }
    )

    in_channels: int = key(1, "channels of an image; a sample of height x width alone counts as one channel")
    channels: int = key(32, "channels inside")
    depth: int = key(2, "residual blocks of two convolutions each")
    num_classes: int = key(10, "outputs")
    norm: str = key(
        "group", "`group`, or `batch`: its result depends on how a batch is split over ranks and micro-batches"
    )

    def __post_init__(self) -> None:
        one_of("model.norm", self.norm, ("group", "batch"))
        for name in ("in_channels", "channels", "depth", "num_classes"):
            at_least(f"model.{name}", getattr(self, name), 1)

    def check_sample(self, shape: tuple[int, ...]) -> None:
        """Raise RecipeError where samples of that shape do not fit."""
        channels = 1 if len(shape) == 2 else shape[0]
        if len(shape) not in (2, 3) or channels != self.in_channels:
            raise RecipeError(
                f"model.in_channels is {self.in_channels}, but samples of the data have the shape {shape}; "
                f"a convnet takes (channels, height, width) or (height, width)"
            )

    def groups(self) -> int:
        """Groups of channels that `norm: group` evens out together: 8, or as many as divide the channels."""
        return math.gcd(8, self.channels)

    def num_parameters(self) -> int:
        """Exactly as many numbers as training moves."""
        stem = 9 * self.in_channels * self.channels
        block = 2 * (9 * self.channels**2 + 2 * self.channels)
        return stem + self.depth * block + 2 * self.channels + (self.channels + 1) * self.num_classes

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """The first value of a parameter: He et al., 2015."""
        rules: dict[str, Initial] = {
            r"stem\.weight|blocks\.\d+\.conv[12]\.weight": fan_in_normal(math.sqrt(2)),
            r"head\.weight": fan_in_normal(1),
            r"(blocks\.\d+\.norm[12]|norm)\.weight": constant(1),
            r"(blocks\.\d+\.norm[12]|norm|head)\.bias": constant(0),
        }
        return by_name(rules)(name, shape, seed)


def share(where: str, value: float) -> None:
    """Raise RecipeError unless the value is at least 0 and below 1."""
    if not 0 <= value < 1:
        raise RecipeError(f"{where} is {value}; it must be at least 0 and below 1")


def _block_matrices(shape: GPTShape) -> int:
    attention, feed_forward = 4 * shape.width**2, 3 * shape.width * shape.ffn
    return attention + feed_forward
