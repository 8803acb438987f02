"""Optimizers of the strategy `tensorflow`: the update of every variable, and state by canonical kind.

Traced into the graph of a step; each variable is moved by one fused kernel of TensorFlow's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from unitrain.errors import UserError
from unitrain.models.layout import SAME, Turn
from unitrain.recipe import OptimizerRecipe
from unitrain.strategies._tensorflow_models import Held


class Slot(NamedTuple):
    """One tensor of optimizer state; `name` is its parameter's, `*` where it belongs to none."""

    kind: str
    name: str
    turn: Turn
    variable: tf.Variable
    element: int | None = None  # its place in a vector that holds one number of each parameter


class Optimizer(ABC):
    """Moves parameters. Gradients run parallel to those given at construction; None: the loss does not reach it."""

    @abstractmethod
    def apply(self, grads: list[Any], lr: Any) -> None:
        """One update. `lr` is a float64 scalar."""

    @abstractmethod
    def slots(self) -> Iterator[Slot]:
        """All state, for checkpoints."""


class AdamW(Optimizer):
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), as torch.optim.AdamW defines it.

    TensorFlow's kernel moves by lr * m / (sqrt(v) + eps), without bias corrections where it is told that the powers
    of both betas are 0; the corrections are in the lr and eps that it gets, computed in fp64.
    """

    def __init__(self, params: list[Held], recipe: OptimizerRecipe) -> None:
        self.params, self.recipe = params, recipe
        self.decays = _decays(params, recipe)
        self.m = [_zeros(held) for held in params]
        self.v = [_zeros(held) for held in params]
        # One vector holds every parameter's count of applied updates.
        self.steps = tf.Variable(tf.zeros([len(params)]), trainable=False)

    def apply(self, grads: list[Any], lr: Any) -> None:
        """See Optimizer."""
        taken = np.array([grad is not None for grad in grads], dtype=np.float32)
        steps = tf.cast(self.steps.assign_add(taken), tf.float64)
        beta1, beta2 = (np.float32(beta) for beta in self.recipe.betas)  # as the kernel has them
        correction1 = 1 - tf.pow(tf.constant(beta1, tf.float64), steps)
        correction2 = tf.sqrt(1 - tf.pow(tf.constant(beta2, tf.float64), steps))
        rates = tf.unstack(tf.cast(lr * correction2 / correction1, tf.float32))
        epsilons = tf.unstack(tf.cast(self.recipe.eps * correction2, tf.float32))
        for held, grad, m, v, rate, eps, decay in zip(
            self.params, grads, self.m, self.v, rates, epsilons, self.decays, strict=True
        ):
            if grad is None:
                continue
            if decay:
                held.variable.assign(held.variable * tf.cast(1 - lr * decay, tf.float32))
            tf.raw_ops.ResourceApplyAdam(
                var=held.variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=tf.constant(0.0),
                beta2_power=tf.constant(0.0),
                lr=rate,
                beta1=tf.constant(beta1),
                beta2=tf.constant(beta2),
                epsilon=eps,
                grad=grad,
            )

    def slots(self) -> Iterator[Slot]:
        """See Optimizer."""
        for number, (held, m, v) in enumerate(zip(self.params, self.m, self.v, strict=True)):
            yield Slot("adamw.m", held.name, held.turn, m)
            yield Slot("adamw.v", held.name, held.turn, v)
            yield Slot("adamw.step", held.name, SAME, self.steps, number)


class SGD(Optimizer):
    """Stochastic gradient descent with optional momentum, as torch.optim.SGD defines it (no dampening)."""

    def __init__(self, params: list[Held], recipe: OptimizerRecipe) -> None:
        self.params, self.recipe = params, recipe
        self.decays = _decays(params, recipe)
        self.momentum = [_zeros(held) for held in params] if recipe.momentum else []

    def apply(self, grads: list[Any], lr: Any) -> None:
        """See Optimizer."""
        rate = tf.cast(lr, tf.float32)
        for number, (held, grad, decay) in enumerate(zip(self.params, grads, self.decays, strict=True)):
            if grad is None:
                continue
            change = grad + decay * held.variable if decay else grad
            if self.momentum:
                tf.raw_ops.ResourceApplyMomentum(
                    var=held.variable.handle,
                    accum=self.momentum[number].handle,
                    lr=rate,
                    grad=change,
                    momentum=tf.constant(self.recipe.momentum, tf.float32),
                )
            else:
                tf.raw_ops.ResourceApplyGradientDescent(var=held.variable.handle, alpha=rate, delta=change)

    def slots(self) -> Iterator[Slot]:
        """See Optimizer."""
        for held, buffer in zip(self.params, self.momentum, strict=False):
            yield Slot("sgd.momentum", held.name, held.turn, buffer)


class Foreign(Optimizer):
    """Any keras.optimizers.Optimizer that a Role's factory made; its own learning rate is scaled by the schedule."""

    def __init__(self, params: list[Held], factory: Callable[[list[Any]], Any], top_lr: float) -> None:
        self.params = params
        owns = [held.own for held in params]
        optimizer = factory(owns)
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise UserError(
                f"a role's optimizer made a {type(optimizer).__name__}; strategy 'tensorflow' needs a "
                "keras.optimizers.Optimizer"
            )
        if not isinstance(optimizer._learning_rate, keras.Variable):
            raise UserError(
                "the Keras optimizer of a role has a learning rate schedule of its own; give it a number, and the "
                "recipe's schedule scales it"
            )
        if optimizer.built:
            raise UserError("the Keras optimizer of a role is built already; make a new one in each call")
        self.optimizer = optimizer
        self.scale = float(optimizer.learning_rate) / top_lr if top_lr else float(optimizer.learning_rate)
        self.scaled = bool(top_lr)
        self.found: list[tuple[str, str, Any]] = []  # (what, canonical name of its parameter, variable)
        self._build(owns)

    def _build(self, owns: list[Any]) -> None:
        """Have the optimizer make its state now, and write down which of it belongs to which parameter."""
        optimizer, names = self.optimizer, {id(held.own): held for held in self.params}
        original = optimizer.add_variable_from_reference

        def noted(reference_variable: Any, name: str | None = None, **others: Any) -> Any:
            made = original(reference_variable, name=name, **others)
            self.found.append((name or "var", names[id(reference_variable)].name, made))
            return made

        optimizer.add_variable_from_reference = noted
        try:
            optimizer.build(owns)
        finally:
            del optimizer.add_variable_from_reference

    def apply(self, grads: list[Any], lr: Any) -> None:
        """See Optimizer."""
        rate = tf.cast(lr * self.scale if self.scaled else self.scale, tf.float32)
        self.optimizer._learning_rate.assign(rate)
        owns = [held.own for held in self.params]
        given = [(grad, own) for grad, own in zip(grads, owns, strict=True) if grad is not None]
        self.optimizer.apply([grad for grad, _ in given], [own for _, own in given])

    def slots(self) -> Iterator[Slot]:
        """See Optimizer. Kinds are `optim.<name>`, as the optimizer names its variables."""
        turns = {held.name: held for held in self.params}
        for what, name, variable in self.found:
            held = turns[name]
            same = tuple(variable.shape) == tuple(held.variable.shape)
            yield Slot(f"optim.{what}", name, held.turn if same else SAME, variable.value)
        yield Slot("optim.iteration", "*", SAME, self.optimizer.iterations.value)
        known = {id(variable) for _, _, variable in self.found}
        known |= {id(self.optimizer.iterations), id(self.optimizer._learning_rate)}
        # The rest goes by its order: names that Keras makes up count the variables of the process.
        others = [variable for variable in self.optimizer.variables if id(variable) not in known]
        for number, variable in enumerate(others):
            yield Slot("optim.other", str(number), SAME, variable.value)


def make_optimizer(
    wanted: OptimizerRecipe | Callable[[list[Any]], Any], params: list[Held], top_lr: float
) -> Optimizer:
    """The optimizer of a role."""
    if not isinstance(wanted, OptimizerRecipe):
        return Foreign(params, wanted, top_lr)
    return {"adamw": AdamW, "sgd": SGD}[wanted.name](params, wanted)


def _decays(params: list[Held], recipe: OptimizerRecipe) -> list[float]:
    return [recipe.weight_decay if recipe.decay == "all" or len(held.shape) >= 2 else 0.0 for held in params]


def _zeros(held: Held) -> tf.Variable:
    return tf.Variable(tf.zeros(held.variable.shape), trainable=False)
