"""How a role's model comes to be on a rank, and what its variables are called: Keras models and `tf.Module`s."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras.src.random.seed_generator import global_seed_generator

from unitrain.errors import Refused, UserError
from unitrain.keras_backend import build_any, is_keras
from unitrain.models.layout import Layout, Plain, Turn
from unitrain.models.state_keras import mix_in, named, state_of
from unitrain.strategy import Role


class Held(NamedTuple):
    """One variable of a model, by its canonical name."""

    name: str
    turn: Turn
    variable: tf.Variable
    own: Any  # the same as the model has it: a tf.Variable, or Keras's around it
    trained: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical shape."""
        return self.turn.canonical_shape(tuple(self.variable.shape))


class Bound:
    """A built model, its variables, and the states of its random generators."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.held, seeds = _keras_state(model) if is_keras(model) else _module_state(model)
        self.params = [held for held in self.held if held.trained]
        self.buffers = [held for held in self.held if not held.trained]
        # Last, the one that Keras draws from where nothing says which.
        self.seeds = [*seeds, global_seed_generator().state.value]
        self._modes = [model] if is_keras(model) else [part for part in (model, *model.submodules) if _has_mode(part)]

    def train(self, training: bool) -> None:
        """Have the model run as in training, or as in inference."""
        for part in self._modes:
            part.training = training


def build_model(role: Role, seed: int, precision: str) -> Bound:
    """The role's model with the first values that its role or the framework gives; alike on all ranks."""
    with _seeded(seed), _computing_in(precision):
        model = build_any(role.model, "tensorflow", seed)
    if not is_keras(model):
        if not isinstance(model, tf.Module):
            raise UserError(
                f"build_model returned a {type(model).__name__}; strategy 'tensorflow' needs a Keras model or a "
                "tf.Module"
            )
        _settle_module(model, precision)
    bound = Bound(model)
    for held in bound.params if role.initial is not None else ():
        assert role.initial is not None
        values = role.initial(held.name, held.shape, seed)
        held.variable.assign(held.turn.to_native(values, tuple(held.variable.shape)))
    return bound


class InMode:
    """Mixed into a tf.Module whose `__call__` takes `training`: called without, it runs as its attribute says."""

    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See tf.Module."""
        kwargs.setdefault("training", self.training)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]  # the module's own


def _settle_module(model: Any, precision: str) -> None:
    if precision != "fp32":
        if not hasattr(model, "compute_dtype"):
            raise Refused(
                f"the tf.Module {type(model).__name__} does not say how it computes in {precision}; give it an "
                "attribute compute_dtype that it casts inputs and variables to, or use a Keras model, or "
                "train.precision=fp32"
            )
        model.compute_dtype = tf.bfloat16
    if callable(model) and "training" in inspect.signature(model).parameters:
        mix_in(model, InMode)
        model.training = False


def _has_mode(part: Any) -> bool:
    return isinstance(getattr(part, "training", None), bool)


def _keras_state(model: Any) -> tuple[list[Held], list[tf.Variable]]:
    state = state_of(model)
    held = [
        Held(name, named(model, variable).turn, variable.value, variable, group is state.params)
        for group in (state.params, state.buffers)
        for name, variable in group.items()
    ]
    return held, [variable.value for variable in state.seeds]


def _module_state(model: tf.Module) -> tuple[list[Held], list[tf.Variable]]:
    """Variables by the attributes that lead to them; those of Keras layers inside by the layer's own names too."""
    layout: Layout = getattr(type(model), "layout", Plain())
    found: dict[int, Held] = {}
    seeds: list[tf.Variable] = []
    kinds = (tf.Variable, keras.Layer)
    for path, leaf in model._flatten(predicate=lambda leaf: isinstance(leaf, kinds), with_path=True):
        native = ".".join(map(str, path))
        variables = {native: leaf}
        if isinstance(leaf, keras.Layer):
            variables = {f"{native}.{variable.path}": variable for variable in leaf.weights}
            weights = {id(variable) for variable in leaf.weights}
            seeds += [variable.value for variable in leaf.variables if id(variable) not in weights]
        for inner, own in variables.items():
            name, turn = layout.of(inner)
            variable = own if isinstance(own, tf.Variable) else own.value
            found.setdefault(id(variable), Held(name, turn, variable, own, bool(own.trainable)))
    held = list(found.values())
    names = [each.name for each in held]
    if not held or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), "")
        raise UserError(
            f"two variables of {type(model).__name__} are called {twice!r}; make its layout tell them apart"
            if held
            else f"build_model returned a {type(model).__name__} without variables; make them in __init__, or call it "
            "once on an example before you return it"
        )
    return held, seeds


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Whatever draws first values draws them from the seed: TensorFlow, Keras (which asks Python) and numpy."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    tf.random.set_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _computing_in(precision: str) -> Iterator[None]:
    """Keras layers that are made meanwhile compute in that precision, with fp32 variables."""
    before = keras.config.dtype_policy()
    if precision == "bf16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
