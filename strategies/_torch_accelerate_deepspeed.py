"""ZeRO by accelerate's DeepSpeed plugin: the engine of the strategies zero1, zero2, ..., made by `Accelerator`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from accelerate import DeepSpeedPlugin, InitProcessGroupKwargs

from unitrain.importers.accelerate import AccelerateConfig
from unitrain.recipe import Recipe
from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch_accelerate import forget_accelerator, make_accelerator
from unitrain.strategies._torch_deepspeed import DeepSpeedStrategy
from unitrain.strategies._torch_deepspeed_engine import RootModule
from unitrain.strategies._torch_ranks import Ranks
from unitrain.world import World


class Zero(DeepSpeedStrategy):
    """The stage and the offloads of the file's DeepSpeed configuration."""

    name: ClassVar[str] = "accelerate"
    problems = staticmethod(_torch_refusals.accelerate)

    def __init__(self, recipe: Recipe, config: AccelerateConfig) -> None:
        stage = _torch_refusals.accelerate_stage(recipe, config)
        super().__init__(stage.recipe)
        self.config, self.stage, self.offloads = config, stage.number, stage.offloads

    def choose_device(self, world: World) -> torch.device:
        """The CPU where the file says so, else as ever."""
        return torch.device("cpu") if self.config.use_cpu else super().choose_device(world)

    def join(self, world: World) -> Ranks:
        """See DeepSpeedStrategy; then have accelerate find the ranks as they are."""
        ranks = super().join(world)
        # The plugin is asked for its stage at once; each role then brings a configuration of its own.
        arguments: dict[str, Any] = {
            "deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=self.configuration(), zero3_init_flag=False),
            "cpu": False,  # with True, accelerate would leave DeepSpeed out and say nothing
        }
        if self.device.type == "cpu":
            arguments["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
        self.accelerator = make_accelerator(self.config, world, self.device, arguments)
        return ranks

    def initialize(self, root: RootModule, optimizer: torch.optim.Optimizer | None, config: dict[str, Any]) -> Any:
        """See DeepSpeedStrategy. By `Accelerator.prepare`, with the plugin set to this configuration."""
        self.accelerator.deepspeed_plugin.deepspeed_config.update(config)
        if optimizer is None:
            return self.accelerator.prepare(root)
        engine, _ = self.accelerator.prepare(root, optimizer)
        return engine

    def close(self) -> None:
        """See Strategy."""
        super().close()
        forget_accelerator(self.world)
