"""PyTorch DDP: every rank holds the whole model; gradients are summed across ranks while backward runs."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.nn.parallel import DistributedDataParallel

from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch import TorchStrategy
from unitrain.strategies._torch_engine import LossModule, Sharing, TorchEngine
from unitrain.strategies._torch_models import apply_model_options, build_model
from unitrain.strategies._torch_replicated import Replicated, leave_buffers_alone
from unitrain.strategy import Role


class DDP(TorchStrategy):
    """Options other than the common ones go to `DistributedDataParallel` unchanged."""

    name: ClassVar[str] = "ddp"
    problems = staticmethod(_torch_refusals.ddp)

    def bind(self, role: Role, seed: int) -> TorchEngine:
        """See Strategy."""
        model = build_model(role, seed, self.device)
        apply_model_options(model, self.options)
        trained = role.optimizer is not None and self.world.size > 1
        losses = LossModule(model, role.losses, self.device, precision=self.recipe.train.precision, carry=trained)
        sharing = self._replicated(losses) if trained else Sharing(losses)
        return TorchEngine(model, role, sharing, self.recipe, self.ranks)

    def _replicated(self, losses: LossModule) -> Replicated:
        own: dict[str, Any] = {"gradient_as_bucket_view": True, "forward_sync_buffers": False}
        own.update({name: value for name, value in self.options.items() if name in _torch_refusals.DDP})
        leave_buffers_alone(losses)
        return Replicated(losses, DistributedDataParallel(losses, **own), self.world.size)
