"""Hugging Face accelerate: your own accelerate configuration file decides how ranks share the model.

The file is read as data and handed to `Accelerator` as arguments: accelerate's launcher, which starts one process on
CPU whatever a file says, is not used, and its environment variables decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from numpy.typing import NDArray

from unitrain.importers.accelerate import AccelerateConfig, read_accelerate
from unitrain.recipe import Recipe
from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch import TorchStrategy
from unitrain.strategies._torch_accelerate import Replicas, Shards
from unitrain.strategy import Engine, Role, Strategy
from unitrain.world import World


class Accelerate(Strategy):
    """Options: `config`, the path of an accelerate configuration file (without it: DDP), and the common ones."""

    name: ClassVar[str] = "accelerate"
    framework: ClassVar[str] = "torch"
    problems = staticmethod(_torch_refusals.accelerate)

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        path = recipe.strategy.options.get("config")
        self.way = _way(recipe, read_accelerate(path) if path else AccelerateConfig())

    def open(self, world: World) -> None:
        """See Strategy."""
        self.way.open(world)

    def bind(self, role: Role, seed: int) -> Engine:
        """See Strategy."""
        return self.way.bind(role, seed)

    def place(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        """See Strategy."""
        return self.way.place(arrays)

    def share(self, text: str) -> str:
        """See Strategy."""
        return self.way.share(text)

    def barrier(self) -> None:
        """See Strategy."""
        self.way.barrier()

    def memory_bytes(self) -> int:
        """See Strategy."""
        return self.way.memory_bytes()

    def peak_flops(self) -> float | None:
        """See Strategy."""
        return self.way.peak_flops()

    def close(self) -> None:
        """See Strategy."""
        self.way.close()


def _way(recipe: Recipe, config: AccelerateConfig) -> TorchStrategy:
    """How the file has ranks share a model."""
    if config.kind == "deepspeed":
        from unitrain.strategies._torch_accelerate_deepspeed import Zero  # the only way that needs DeepSpeed

        return Zero(recipe, config)
    return Shards(recipe, config) if config.kind == "fsdp" else Replicas(recipe, config)
