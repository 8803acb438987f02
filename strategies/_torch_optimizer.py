"""Optimizers of the torch strategies: the update of this rank's parameters, and state by canonical kind.

They work on plain local tensors, whatever the strategy shards, and skip a non-finite step on the device, so that
no step waits for the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unitrain.recipe import OptimizerRecipe


class Slot(NamedTuple):
    """One tensor of optimizer state; `name` is its parameter's."""

    kind: str
    name: str
    tensor: Tensor
    whole: bool  # True: every rank holds all of it (a count); False: laid out as the parameter is


class Optimizer(ABC):
    """Moves parameters. Lists run parallel to the trainable parameters given at construction."""

    @abstractmethod
    def apply(self, params: list[Tensor], grads: list[Tensor | None], lr: float, skip: Tensor) -> None:
        """One update in place. `skip` is a float32 scalar on the device: 1 leaves everything as it is."""

    @abstractmethod
    def slots(self) -> Iterator[Slot]:
        """All state, for checkpoints."""

    def prepare(self, wanted: Mapping[tuple[str, str], tuple[int, ...]]) -> None:  # noqa: B027 - most need nothing
        """Make slots for the (kind, name) pairs that a checkpoint holds, where they are made lazily."""


class AdamW(Optimizer):
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), as torch.optim.AdamW defines it.

    Calls torch's fused kernel itself: torch.optim's wrapper costs more Python calls a step than all of the loop.
    """

    def __init__(self, names: list[str], params: list[Tensor], ndims: list[int], recipe: OptimizerRecipe) -> None:
        self.names, self.recipe = names, recipe
        self.m = [torch.zeros_like(param) for param in params]
        self.v = [torch.zeros_like(param) for param in params]
        # One vector holds every parameter's count of applied updates; the kernel takes views of it.
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=params[0].device if params else None)
        self.step_views = list(self.steps.unbind())
        self.groups = _groups(params, ndims, recipe)

    @torch.no_grad()
    def apply(self, params: list[Tensor], grads: list[Tensor | None], lr: float, skip: Tensor) -> None:
        """See Optimizer."""
        beta1, beta2 = self.recipe.betas
        absent = [number for number, grad in enumerate(grads) if grad is None]
        if absent:
            taken = torch.ones_like(self.steps)
            taken[absent] = 0
            self.steps.add_(taken * (1 - skip))
        else:
            self.steps.add_(1 - skip)
        for decay, members in self.groups:
            chosen = [number for number in members if grads[number] is not None] if absent else members
            if not chosen:
                continue
            torch._fused_adamw_(
                [params[n] for n in chosen],
                [grads[n] for n in chosen],  # type: ignore[misc]  # absent ones were left out above
                [self.m[n] for n in chosen],
                [self.v[n] for n in chosen],
                [],
                [self.step_views[n] for n in chosen],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay,
                eps=self.recipe.eps,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )

    def slots(self) -> Iterator[Slot]:
        """See Optimizer."""
        for name, m, v, step in zip(self.names, self.m, self.v, self.step_views, strict=True):
            yield Slot("adamw.m", name, m, whole=False)
            yield Slot("adamw.v", name, v, whole=False)
            yield Slot("adamw.step", name, step, whole=True)


class SGD(Optimizer):
    """Stochastic gradient descent with optional momentum, as torch.optim.SGD defines it (no dampening)."""

    def __init__(self, names: list[str], params: list[Tensor], ndims: list[int], recipe: OptimizerRecipe) -> None:
        self.names, self.recipe = names, recipe
        self.momentum = [torch.zeros_like(param) for param in params] if recipe.momentum else []
        self.groups = _groups(params, ndims, recipe)

    @torch.no_grad()
    def apply(self, params: list[Tensor], grads: list[Tensor | None], lr: float, skip: Tensor) -> None:
        """See Optimizer."""
        for decay, members in self.groups:
            chosen = [number for number in members if grads[number] is not None]
            if not chosen:
                continue
            torch._fused_sgd_(
                [params[n] for n in chosen],
                [grads[n] for n in chosen],  # type: ignore[misc]  # absent ones were left out above
                [self.momentum[n] for n in chosen] if self.momentum else [],
                weight_decay=decay,
                momentum=self.recipe.momentum,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,  # buffers start at zero, which gives the first step torch defines
                found_inf=skip,
            )

    def slots(self) -> Iterator[Slot]:
        """See Optimizer."""
        for name, buffer in zip(self.names, self.momentum, strict=False):
            yield Slot("sgd.momentum", name, buffer, whole=False)


class Foreign(Optimizer):
    """Any torch.optim.Optimizer that a Role's factory made.

    Its own learning rates are scaled by the schedule. Costs one host sync a step: only the fused kernels can
    skip a non-finite step on the device.
    """

    def __init__(
        self, names: list[str], params: list[Tensor], factory: Callable[[list[Tensor]], Any], top_lr: float
    ) -> None:
        self.names, self.params, self.top_lr = names, params, top_lr
        self.optimizer = factory(params)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def apply(self, params: list[Tensor], grads: list[Tensor | None], lr: float, skip: Tensor) -> None:
        """See Optimizer. The parameters' own `.grad` are used."""
        if skip.item():
            return
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (lr / self.top_lr if self.top_lr else 1.0)
        self.optimizer.step()

    def slots(self) -> Iterator[Slot]:
        """See Optimizer. Kinds are `optim.<key>`; entries shaped like the parameter are laid out as it is."""
        for name, param in zip(self.names, self.params, strict=True):
            for key, value in self.optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    yield Slot(f"optim.{key}", name, value, whole=value.shape != param.shape)

    def prepare(self, wanted: Mapping[tuple[str, str], tuple[int, ...]]) -> None:
        """See Optimizer. torch makes state at the first step; a resumed run needs it before."""
        by_name = dict(zip(self.names, self.params, strict=True))
        for (kind, name), shape in wanted.items():
            param = by_name.get(name)
            if param is None or not kind.startswith("optim."):
                continue
            like = torch.zeros_like(param) if tuple(param.shape) == shape else torch.zeros(shape)
            self.optimizer.state[param].setdefault(kind.removeprefix("optim."), like)


def make_optimizer(
    wanted: OptimizerRecipe | Callable[[list[Tensor]], Any],
    names: list[str],
    params: list[Tensor],
    local: list[Tensor],
    top_lr: float,
) -> Optimizer:
    """The optimizer of a role. `local` are this rank's parts of `params`."""
    if not isinstance(wanted, OptimizerRecipe):
        return Foreign(names, params, wanted, top_lr)
    kinds = {"adamw": AdamW, "sgd": SGD}
    return kinds[wanted.name](names, local, [param.ndim for param in params], wanted)


def _groups(params: list[Tensor], ndims: list[int], recipe: OptimizerRecipe) -> list[tuple[float, list[int]]]:
    """(weight decay, indices of its parameters): what one call of a fused kernel can take."""
    groups: dict[tuple[float, torch.dtype, torch.device], list[int]] = {}
    for number, (param, ndim) in enumerate(zip(params, ndims, strict=True)):
        decay = recipe.weight_decay if recipe.decay == "all" or ndim >= 2 else 0.0
        groups.setdefault((decay, param.dtype, param.device), []).append(number)
    return [(decay, members) for (decay, _, _), members in groups.items()]
