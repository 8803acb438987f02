"""PyTorch DDP: every rank holds the whole model; gradients are summed across ranks while backward runs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from unitrain.batch import MicroBatch
from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch import TorchStrategy
from unitrain.strategies._torch_engine import LossModule, Sharing, TorchEngine, norm_of
from unitrain.strategies._torch_models import apply_model_options, build_model
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
        own = {name: value for name, value in self.options.items() if name in _torch_refusals.DDP}
        sharing = Replicated(losses, own, self.world.size) if trained else Sharing(losses)
        return TorchEngine(model, role, sharing, self.recipe, self.ranks)


class Replicated(Sharing):
    """Replicas under DistributedDataParallel, which divides all that it sums by the number of ranks."""

    def __init__(self, losses: LossModule, options: dict[str, Any], ranks: int) -> None:
        super().__init__(losses)
        # Buffers are shared when they are read (evaluation, checkpoints), not in every forward pass.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            losses, [name for name, _ in losses.named_buffers()]
        )
        self.ddp = DistributedDataParallel(
            losses, **{"gradient_as_bucket_view": True, "forward_sync_buffers": False, **options}
        )
        self.module = self.ddp
        self.divisor = ranks
        self.rehearsed: set[str] = set()

    def before_update(self, loss: str, first: MicroBatch) -> None:
        """Run the first backward pass once for nothing, where the order of a sum matters.

        DDP lays its buckets out anew after the first backward pass. From three ranks on, a sum's last bits depend
        on that layout, and a resumed run would differ from an uninterrupted one in its first step.
        """
        if loss in self.rehearsed or self.divisor < 3:
            return
        self.rehearsed.add(loss)
        kept = [(buffer, buffer.clone()) for buffer in self.losses.buffers()]
        self.ddp(loss, first).backward()
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for param in self.losses.parameters():
            param.grad = None
        self.losses.start()

    def before_micro(self, last: bool) -> None:
        """See Sharing."""
        # The flag behind no_sync(), without a context a micro-batch.
        self.ddp.require_backward_grad_sync = last

    def totals_and_norm(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See Sharing."""
        carry = self.losses.carry
        assert carry is not None and carry.grad is not None, "the loss was multiplied by it"
        # A copy: the gradient lies in a bucket of DDP's, which the next update overwrites.
        totals, carry.grad = carry.grad.clone(), None
        return totals, norm_of(grads)
