"""Strategies that break one clause of the contract each: the conformance suite must catch every one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from unitrain.batch import Batch, MicroBatch
from unitrain.strategies._torch_engine import TorchEngine, TorchStepOut
from unitrain.strategies._torch_replicated import Replicated
from unitrain.strategies.ddp import DDP
from unitrain.strategy import HyperParameters, Role, Shard


class _Mutant(DDP):
    engine: type[TorchEngine] = TorchEngine

    def bind(self, role: Role, seed: int) -> TorchEngine:
        bound = super().bind(role, seed)
        bound.__class__ = self.engine
        if isinstance(bound.sharing, Replicated):
            self.spoil(bound.sharing)
        return bound

    def spoil(self, sharing: Any) -> None:
        """Change how ranks share the model."""


class NoGradientSync(_Mutant):
    """Every rank follows its own gradient."""

    def spoil(self, sharing: Any) -> None:
        sharing.before_micro = lambda last: setattr(sharing.ddp, "require_backward_grad_sync", False)
        sharing.totals_and_norm = self._own_totals(sharing)

    @staticmethod
    def _own_totals(sharing: Any) -> Any:
        def totals_and_norm(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
            return sharing.losses.totals, torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

        return totals_and_norm


class MeanOfMeans(_Mutant):
    """Each micro-batch counts alike, whatever its weight."""

    def spoil(self, sharing: Any) -> None:
        measured = sharing.losses.measured

        def unweighted(name: str, micro: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total, pair, metrics = measured(name, micro)
            weight = pair[1].clamp(min=1.0)
            return total / weight, pair / weight, metrics

        sharing.losses.measured = unweighted


class PerRankClip(_Mutant):
    """Each rank clips by the norm of what it has itself, before the gradients are summed."""

    class engine(TorchEngine):  # noqa: N801 - it takes the place of an attribute
        def update(self, batch: Batch, hp: HyperParameters, loss: str = "loss") -> TorchStepOut:
            for param in self.params:
                if not hasattr(param, "clipped"):
                    param.clipped = param.register_hook(
                        lambda grad: grad * (20.0 / (grad.norm() + 1e-6)).clamp(max=1.0)
                    )
            return super().update(batch, HyperParameters(hp.lr, None), loss)


class LostSlot(_Mutant):
    """The second moment is not saved."""

    class engine(TorchEngine):  # noqa: N801 - it takes the place of an attribute
        def shards(self, kinds: Collection[str] | None = None) -> Iterator[Shard]:
            return (shard for shard in super().shards(kinds) if shard.kind != "adamw.v")

        def load(self, reader: Any, kinds: Collection[str] | None = None) -> Any:
            report = super().load(reader, ("param", "adamw.m", "adamw.step"))
            return report._replace(unexpected=[])


class RateByWorldSize(_Mutant):
    """The learning rate grows with the number of ranks."""

    class engine(TorchEngine):  # noqa: N801 - it takes the place of an attribute
        def update(self, batch: Batch, hp: HyperParameters, loss: str = "loss") -> TorchStepOut:
            return super().update(batch, HyperParameters(hp.lr * self.ranks.size, hp.clip), loss)


class AppliesTheNonFinite(_Mutant):
    """A non-finite gradient is applied after all."""

    class engine(TorchEngine):  # noqa: N801 - it takes the place of an attribute
        def update(self, batch: Batch, hp: HyperParameters, loss: str = "loss") -> TorchStepOut:
            apply = self.optimizer.apply
            self.optimizer.apply = lambda params, grads, lr, skip: apply(params, grads, lr, torch.zeros(()))
            try:
                return super().update(batch, hp, loss)
            finally:
                self.optimizer.apply = apply


class DigestOfOwnShard(_Mutant):
    """Only rank 0's part is hashed."""

    class engine(TorchEngine):  # noqa: N801 - it takes the place of an attribute
        def digest(self) -> dict[str, int]:
            return {name: value // self.ranks.size for name, value in super().digest().items()}
