"""One process: the reference that every other strategy is compared with."""

from __future__ import annotations

from typing import ClassVar

from unitrain.recipe import Recipe
from unitrain.strategies._torch import TorchStrategy
from unitrain.strategies._torch_engine import COMPUTE, LossModule, Sharing, TorchEngine
from unitrain.strategies._torch_models import apply_model_options, build_model
from unitrain.strategy import Cluster, Problem, Role


class Single(TorchStrategy):
    """The whole model, batch and optimizer on one device."""

    name: ClassVar[str] = "single"

    @classmethod
    def problems(cls, recipe: Recipe, cluster: Cluster) -> list[Problem]:
        """See Strategy."""
        found = super().problems(recipe, cluster)
        if cluster.ranks > 1:
            found.append(
                Problem(
                    f"strategy 'single' trains in one process, but {cluster.ranks} ranks were asked for",
                    "use --nproc 1, or --strategy ddp or fsdp2",
                )
            )
        return found

    def bind(self, role: Role, seed: int) -> TorchEngine:
        """See Strategy."""
        model = build_model(role, seed, self.device)
        apply_model_options(model, self.options)
        losses = LossModule(model, role.losses, compute=COMPUTE[self.recipe.train.precision])
        return TorchEngine(model, role, Sharing(losses), self.recipe, self.world)
