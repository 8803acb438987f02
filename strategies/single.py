"""One process: the reference that every other strategy is compared with."""

from __future__ import annotations

from typing import ClassVar

from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch import TorchStrategy
from unitrain.strategies._torch_engine import LossModule, Sharing, TorchEngine
from unitrain.strategies._torch_models import apply_model_options, build_model
from unitrain.strategy import Role


class Single(TorchStrategy):
    """The whole model, batch and optimizer on one device."""

    name: ClassVar[str] = "single"

    problems = staticmethod(_torch_refusals.single)

    def bind(self, role: Role, seed: int) -> TorchEngine:
        """See Strategy."""
        model = build_model(role, seed, self.device)
        apply_model_options(model, self.options)
        losses = LossModule(model, role.losses, self.device, precision=self.recipe.train.precision)
        return TorchEngine(model, role, Sharing(losses), self.recipe, self.ranks)
