"""Optimizers of the jax strategy: pure updates of lists of parameters, and state by canonical kind.

They work on global arrays inside the compiled step.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from unitrain.errors import UserError
from unitrain.recipe import OptimizerRecipe
from unitrain.strategies._jax_model import Variable, step_name

State = Any  # a tree of arrays


class Slot(NamedTuple):
    """One tensor of optimizer state; `name` is its parameter's."""

    kind: str
    name: str
    leaf: int  # of the flattened state
    param: int | None  # the parameter that it is laid out as; None: every rank holds the whole
    element: int | None = None  # it is this number of a vector


class Optimizer(ABC):
    """Moves parameters. Lists run parallel to the trained variables given at construction."""

    @abstractmethod
    def state(self, params: list[Array]) -> State:
        """What it begins with. Pure."""

    @abstractmethod
    def apply(
        self, params: list[Array], grads: list[Array], state: State, lr: Array, skip: Array
    ) -> tuple[list[Array], State]:
        """Parameters and state after one update; the same bits as before where `skip` is true. Pure."""

    @abstractmethod
    def slots(self) -> list[Slot]:
        """All state, for checkpoints and sharding; what no slot names is not saved."""


class AdamW(Optimizer):
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), as torch.optim.AdamW defines it."""

    def __init__(self, variables: Sequence[Variable], recipe: OptimizerRecipe) -> None:
        self.names, self.recipe = [variable.name for variable in variables], recipe
        self.decays = _decays(variables, recipe)

    def state(self, params: list[Array]) -> State:
        """See Optimizer. One vector holds every parameter's count of applied updates."""
        m, v = ([jnp.zeros_like(param) for param in params] for _ in range(2))
        return {"m": m, "step": jnp.zeros(len(params), jnp.float32), "v": v}

    def apply(
        self, params: list[Array], grads: list[Array], state: State, lr: Array, skip: Array
    ) -> tuple[list[Array], State]:
        """See Optimizer."""
        beta1, beta2 = self.recipe.betas
        step = state["step"] + 1
        # 1 - beta ** step, which fp32 would round to few digits where beta is near 1
        corrected1, corrected2 = (-jnp.expm1(step * _log(beta)) for beta in (beta1, beta2))
        after: tuple[list[Array], list[Array], list[Array]] = ([], [], [])
        rows = zip(params, grads, state["m"], state["v"], self.decays, strict=True)
        for number, (param, grad, old_m, old_v, decay) in enumerate(rows):
            m = _less(old_m, (1 - beta1) * (old_m - grad), skip)
            v = _less(old_v, (1 - beta2) * (old_v - grad * grad), skip)
            spread = jnp.sqrt(v / corrected2[number]) + self.recipe.eps
            moved = _less(param, lr * decay * param + lr / corrected1[number] * (m / spread), skip)
            for values, value in zip(after, (moved, m, v), strict=True):
                values.append(value)
        return after[0], {"m": after[1], "step": jnp.where(skip, state["step"], step), "v": after[2]}

    def slots(self) -> list[Slot]:
        """See Optimizer."""
        count = len(self.names)
        found = []
        for number, name in enumerate(self.names):
            found.append(Slot("adamw.m", name, number, number))
            found.append(Slot("adamw.v", name, count + 1 + number, number))
            found.append(Slot("adamw.step", name, count, None, number))
        return found


class SGD(Optimizer):
    """Stochastic gradient descent with optional momentum, as torch.optim.SGD defines it (no dampening)."""

    def __init__(self, variables: Sequence[Variable], recipe: OptimizerRecipe) -> None:
        self.names, self.recipe = [variable.name for variable in variables], recipe
        self.decays = _decays(variables, recipe)

    def state(self, params: list[Array]) -> State:
        """See Optimizer."""
        return [jnp.zeros_like(param) for param in params] if self.recipe.momentum else []

    def apply(
        self, params: list[Array], grads: list[Array], state: State, lr: Array, skip: Array
    ) -> tuple[list[Array], State]:
        """See Optimizer."""
        grads = [grad + decay * param for param, grad, decay in zip(params, grads, self.decays, strict=True)]
        rate = self.recipe.momentum
        if rate:
            grads = state = [_less(old, (1 - rate) * old - grad, skip) for old, grad in zip(state, grads, strict=True)]
        return [_less(param, lr * grad, skip) for param, grad in zip(params, grads, strict=True)], state

    def slots(self) -> list[Slot]:
        """See Optimizer."""
        if not self.recipe.momentum:
            return []
        return [Slot("sgd.momentum", name, number, number) for number, name in enumerate(self.names)]


class Foreign(Optimizer):
    """Any optax.GradientTransformation that a Role's function made of {canonical name: parameter}.

    Its updates are scaled by the schedule, as if it did so with the learning rate that it was made with.
    """

    def __init__(
        self, variables: Sequence[Variable], factory: Callable[[Any], Any], shapes: Sequence[Any], top_lr: float
    ) -> None:
        self.names, self.top_lr = [variable.name for variable in variables], top_lr
        params = dict(zip(self.names, shapes, strict=True))
        self.made = factory(params)
        if not callable(getattr(self.made, "init", None)) or not callable(getattr(self.made, "update", None)):
            raise UserError(
                f"the role's optimizer returned a {type(self.made).__name__}; the jax strategy needs an "
                "optax.GradientTransformation"
            )
        self.flat, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(self.made.init, params))
        self.shapes = params

    def state(self, params: list[Array]) -> State:
        """See Optimizer."""
        return self.made.init(dict(zip(self.names, params, strict=True)))

    def apply(
        self, params: list[Array], grads: list[Array], state: State, lr: Array, skip: Array
    ) -> tuple[list[Array], State]:
        """See Optimizer."""
        named = dict(zip(self.names, params, strict=True))
        updates, after = self.made.update(dict(zip(self.names, grads, strict=True)), state, named)
        scale = lr / self.top_lr if self.top_lr else 1.0
        moved = [_less(param, -scale * updates[name], skip) for name, param in named.items()]
        return moved, jax.tree.map(functools.partial(jnp.where, skip), state, after)

    def slots(self) -> list[Slot]:
        """See Optimizer. Kinds are `optim.<place in optax's state>`; what belongs to no parameter is named `*`."""
        numbers = {name: number for number, name in enumerate(self.names)}
        found = []
        for leaf, (path, shape) in enumerate(self.flat):
            words = [step_name(step) for step in path]
            name = next((word for word in words if word in numbers), "*")
            kind = ".".join(["optim", *(word for word in words if word != name)])
            alike = name in numbers and shape.shape == self.shapes[name].shape
            found.append(Slot(kind, name, leaf, numbers[name] if alike else None))
        return found


def make_optimizer(
    wanted: OptimizerRecipe | Callable[[Any], Any],
    variables: Sequence[Variable],
    shapes: Sequence[Any],
    top_lr: float,
) -> Optimizer:
    """The optimizer of a role whose trained variables have these shapes."""
    if not isinstance(wanted, OptimizerRecipe):
        return Foreign(variables, wanted, shapes, top_lr)
    return {"adamw": AdamW, "sgd": SGD}[wanted.name](variables, wanted)


def _decays(variables: Sequence[Variable], recipe: OptimizerRecipe) -> list[float]:
    """The weight decay of each; what a matrix is, its canonical shape says."""
    return [
        recipe.weight_decay if recipe.decay == "all" or len(variable.turn.canonical_shape(variable.shape)) >= 2 else 0.0
        for variable in variables
    ]


def _less(old: Array, amount: Array, skip: Array) -> Array:
    """old - amount, or old itself.

    Choosing between the old and a new array would say the same, but XLA, which writes the new one over the old, then
    makes loops of it that take several times as long on CPUs.
    """
    return (old - jnp.where(skip, 0.0, amount)).astype(old.dtype)


def _log(beta: float) -> float:
    """The logarithm of a decay rate, which may be zero."""
    return math.log(beta) if beta else -math.inf
