"""The ConvNet of models/config.py in PyTorch.

Canonical names: stem, blocks.N.norm1, .conv1, .norm2, .conv2, norm, head.
"""

from __future__ import annotations

from torch import Tensor, nn

from .config import ConvNet


class ConvNetModule(nn.Module):
    """Images (rows, channels, height, width), or (rows, height, width) of one channel, to logits (rows, classes)."""

    def __init__(self, config: ConvNet) -> None:
        super().__init__()
        self.stem = nn.Conv2d(config.in_channels, config.channels, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = normalisation(config)
        self.head = nn.Linear(config.channels, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        x = self.stem(x.unsqueeze(1) if x.dim() == 3 else x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(nn.functional.silu(self.norm(x)).mean(dim=(2, 3)))
        return logits

    def sharding_units(self) -> list[nn.Module]:
        """Submodules that a sharding strategy gathers and frees as one, in the order in which they run."""
        return list(self.blocks)


class Block(nn.Module):
    """He et al., "Identity Mappings in Deep Residual Networks", 2016: normalise first, add last."""

    def __init__(self, config: ConvNet) -> None:
        super().__init__()
        self.norm1 = normalisation(config)
        self.conv1 = nn.Conv2d(config.channels, config.channels, 3, padding=1, bias=False)
        self.norm2 = normalisation(config)
        self.conv2 = nn.Conv2d(config.channels, config.channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels, height, width) to the same shape."""
        inner: Tensor = self.conv1(nn.functional.silu(self.norm1(x)))
        inner = self.conv2(nn.functional.silu(self.norm2(inner)))
        return x + inner


def normalisation(config: ConvNet) -> nn.Module:
    """Over groups of channels of one image, or over the images that one rank sees at once."""
    if config.norm == "batch":
        return nn.BatchNorm2d(config.channels)
    return nn.GroupNorm(config.groups(), config.channels)
