"""One optimizer step by a DeepSpeed engine, to our definition of it, and DeepSpeed's state in and out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.utils import count_used_parameters_in_backward
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, is_zero_param
from torch import Tensor, nn

from unitrain.batch import Batch, MicroBatch
from unitrain.errors import Refused, UserError
from unitrain.recipe import OptimizerRecipe, Recipe
from unitrain.strategies._torch_deepspeed_state import PartitionedWeights, Partitions, ReplicatedWeights
from unitrain.strategies._torch_engine import (
    FP16_GROWTH_STEPS,
    LossModule,
    Place,
    Sharing,
    TorchEngine,
    TorchStepOut,
)
from unitrain.strategies._torch_optimizer import Optimizer
from unitrain.strategies._torch_ranks import Ranks
from unitrain.strategy import HyperParameters, Role


class RootModule(LossModule):
    """A LossModule whose forward pass can run anything: DeepSpeed gathers parameters while its root runs."""

    task: Callable[[], None] | None = None

    def forward(self, name: str = "", micro: MicroBatch | None = None) -> Tensor:
        """See LossModule; with a task, that and nothing else."""
        if self.task is not None:
            self.task()
            return torch.zeros(())
        assert micro is not None, "a loss is of a micro-batch"
        return super().forward(name, micro)


class Partitioned(Sharing):
    """ZeRO over all ranks, which divides gradients by their number."""

    losses: RootModule

    def __init__(self, losses: RootModule, ranks: int) -> None:
        super().__init__(losses)
        self.divisor = ranks

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """See Sharing."""
        found: list[Any] = []
        self.losses.task = lambda: found.append(function(*args))
        try:
            self.losses()
        finally:
            self.losses.task = None
        return found[0]


class DeepSpeedEngine(TorchEngine):
    """A role trained, or only held, by an engine of `deepspeed.initialize`, whose root is a RootModule.

    DeepSpeed accumulates, reduces, clips and moves; we say when and by how much. It reads the norm on the host in
    every step, and so do we the weight. Ranks must have gradients of the same parameters, all of them: DeepSpeed
    would add up those of different ones, or abort, and move one without a gradient as by a zero one.
    """

    def __init__(
        self, engine: Any, model: nn.Module, role: Role, sharing: Partitioned, recipe: Recipe, ranks: Ranks
    ) -> None:
        super().__init__(model, role, sharing, recipe, ranks)
        self.engine = engine
        self.neighbours: list[DeepSpeedEngine] = []  # whose models our losses may run too
        self.partitions: Partitions | None = None
        if isinstance(role.optimizer, OptimizerRecipe):
            self.zero = engine.optimizer
            sharded = bool(engine.zero_optimization_partition_weights())
            kind = PartitionedWeights if sharded else ReplicatedWeights
            self.partitions = kind(self.zero, dict(zip(self.params, self.names, strict=True)))
            self.partitions.start_state(role.optimizer)
            self.vetoed = False
            self._watch_norm()

    def _make_optimizer(self, recipe: Recipe) -> Optimizer | None:
        """See TorchEngine. It is DeepSpeed's."""
        return None

    def update(self, batch: Batch, hp: HyperParameters, loss: str = "loss") -> TorchStepOut:
        """See Engine."""
        if self.partitions is None:
            raise UserError("this role has no optimizer, so it cannot be updated; give Role(optimizer=...)")
        if not self.model.training:
            self.model.train()
        self.losses.start()
        self.partitions.clear_gradients()
        self.zero.custom_loss_scaler, self.zero.external_loss_scale = True, 1.0
        with self._alone():
            for micro in batch.micro():
                self._seed(micro.key)
                found = self.engine(loss, micro)
                found.register_hook(self._refuse_unused)
                self.engine.backward(found, scale_wrt_gas=False)
        return self._apply(hp)

    @torch.no_grad()
    def _apply(self, hp: HyperParameters) -> TorchStepOut:
        """See TorchEngine. The weight is DeepSpeed's loss scale: it divides by it and clips what that leaves."""
        totals = self.losses.totals
        assert totals is not None and self.partitions is not None, "a backward pass came before"
        self.ranks.sum(totals)
        weight = float(totals[1])
        self.vetoed = not (math.isfinite(weight) and weight > 0)
        scale = 1.0 if self.losses.scale is None else float(self.losses.scale)
        self.zero.external_loss_scale = 1.0 if self.vetoed else weight * scale / self.sharing.divisor
        self.zero.clip_grad = hp.clip or 0.0
        for group in self.zero.optimizer.param_groups:
            group["lr"] = hp.lr
        _forget_powers(self.zero.optimizer)
        self.partitions.before_step()
        self.engine.step()
        skip = torch.tensor(float(self.zero.overflow), device=totals.device)
        if self.losses.scale is not None:
            torch._amp_update_scale_(self.losses.scale, self.good_steps, skip, 2.0, 0.5, FP16_GROWTH_STEPS)
        norm = torch.as_tensor(self.zero._global_grad_norm, dtype=torch.float32, device=totals.device)
        return TorchStepOut(totals, 1, norm, skip, self.losses.metrics, self.ranks)

    def _refuse_unused(self, grad: Tensor) -> None:
        """Raise Refused for a parameter that a loss does not depend on. Called in backward, before ranks meet."""
        if count_used_parameters_in_backward(self.params) == len(self.params):
            return
        params = zip(self.names, self.params, strict=True)
        name = next(name for name, param in params if not count_used_parameters_in_backward([param]))
        raise Refused(
            f"DeepSpeed needs a gradient of every parameter from every micro-batch, and {name!r} got none; freeze it "
            "(requires_grad_(False)) if nothing ever uses it, or use --strategy fsdp2 or horovod"
        )

    def _watch_norm(self) -> None:
        """Have DeepSpeed skip what we do not want applied, by its own way of dropping a non-finite gradient."""
        zero = self.zero
        name = "_get_norm_groups" if isinstance(self.partitions, PartitionedWeights) else "scaled_global_norm"
        measure: Callable[[], Any] = getattr(zero, name)

        def measured() -> Any:
            found = measure()
            if not self.vetoed:
                return found
            return [torch.full_like(norm, math.inf) for norm in found] if isinstance(found, list) else math.inf

        setattr(zero, name, measured)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Losses may run other roles' models, whose engines would take the gradients for their own."""
        others = [param for engine in self.neighbours for param in engine.params]
        for param in others:
            param.requires_grad_(False)
        try:
            yield
        finally:
            for param in others:
                param.requires_grad_(True)

    def _places(self, *, writing: bool = False) -> Iterator[Place]:
        """See TorchEngine."""
        trained = set(self.names) if self.partitions is not None else set()
        for name, param in self.model.named_parameters():
            if name not in trained:
                yield from self._untrained(name, param, writing)
        for name, buffer in self.buffers:
            yield Place("buffer", name, buffer, tuple(buffer.shape), None)
        if self.partitions is not None:
            assert isinstance(self.role.optimizer, OptimizerRecipe), "there are partitions"
            yield from self.partitions.places(self.role.optimizer, writing=writing)
        if self.losses.scale is not None:
            yield Place("fp16.scale", "*", self.losses.scale, (), None)
            yield Place("fp16.good_steps", "*", self.good_steps, (1,), None)

    def _untrained(self, name: str, param: Any, writing: bool) -> Iterator[Place]:
        """A parameter without a master: whole on this rank, or gathered for its turn."""
        if not is_zero_param(param):
            yield Place("param", name, param.detach(), tuple(param.shape), None)
            return
        with GatheredParameters([param], modifier_rank=0 if writing else None):
            whole = param.detach() if writing else param.detach().clone()
            yield Place("param", name, whole, tuple(param.ds_shape), None)


def _forget_powers(optimizer: Any) -> None:
    """Have DeepSpeedCPUAdam compute beta ** step anew, which it else multiplies up from step to step.

    A resumed run starts from the power, and the last bit of the product may differ.
    """
    if hasattr(optimizer, "ds_opt_adam"):
        group, nothing = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
        options = (group["lr"], *group["betas"], group["eps"], 0.0, group["bias_correction"])
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, *options, *nothing)
