"""What a model is to the jax strategy: named variables, and a way to run user code with given values in them."""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from unitrain.errors import UserError
from unitrain.keras_backend import build_any, is_keras
from unitrain.models.layout import SAME, Layout, Plain, Turn
from unitrain.strategy import Role


class Variable(NamedTuple):
    """One array of a model."""

    name: str  # canonical
    kind: str  # param, buffer, or constant: what no checkpoint holds
    shape: tuple[int, ...]  # as the framework has it
    dtype: Any
    trained: bool = False
    turn: Turn = SAME  # from the framework's axes to the canonical ones
    tensor_axis: int | None = None  # of the framework's axes, which a `tensor` axis of the mesh may cut


class Definition(ABC):
    """A model without its values. Lists of values run parallel to `variables`."""

    variables: Sequence[Variable]
    random: bool  # False: it draws no random numbers
    remat_by_model = False  # True: its blocks are computed again in the backward pass, as it does itself

    @abstractmethod
    def run(
        self, function: Callable[[Any], Any], values: Sequence[Array], key: Array, *, training: bool
    ) -> tuple[Any, list[Array]]:
        """(`function(model)`, the values afterwards). Pure: may be traced. `key` (2,) uint32 seeds what is random."""

    @abstractmethod
    def model(self, values: Sequence[Array], *, training: bool) -> Any:
        """The native model with these values."""

    def ask_remat(self) -> None:  # noqa: B027 - most cannot
        """Have the model compute its blocks again in the backward pass, if it can; see `remat_by_model`."""

    @abstractmethod
    def first_values(self, chosen: Sequence[int]) -> list[Any]:
        """What these variables begin with by the model's own doing, the same on every rank."""


def define(role: Role, seed: int, *, remat: bool) -> Definition:
    """The definition of the role's model: a Flax NNX module, or a pair of pure functions (init, apply)."""
    if role.initial is None:
        # On the host: what is large is not to lie whole on an accelerator, not even for a moment.
        with jax.default_device(_host()), nnx.use_eager_sharding(False):
            definition = _defined(build_any(role.model, "jax", seed), seed)
    else:
        definition = _define_abstractly(role, seed)
    if remat:
        definition.ask_remat()
    names = [variable.name for variable in definition.variables if variable.kind != "constant"]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise UserError(f"the model has two variables with the canonical name {twice!r}; mend its layout")
    return definition


def _define_abstractly(role: Role, seed: int) -> Definition:
    """Without memory for parameters, where the model can be made so."""
    made: list[Any] = []

    def make() -> Any:
        made.append(build_any(role.model, "jax", seed))
        return made[0] if isinstance(made[0], nnx.Module) else None

    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(make)
        if isinstance(made[0], nnx.Module):
            definition = NNX(model, role.model)
            if not definition.leaks:
                return definition
        # No module, or one with an attribute that holds an array and is not said to be data.
        return _defined(build_any(role.model, "jax", seed), seed)


def _defined(model: Any, seed: int) -> Definition:
    if isinstance(model, nnx.Module):
        return NNX(model, None)
    if isinstance(model, tuple) and len(model) == 2 and all(callable(part) for part in model):
        return Pair(model[0], model[1], seed)
    if is_keras(model):
        from unitrain.strategies._jax_keras import Keras  # which imports Keras

        return Keras(model)
    raise UserError(
        f"build_model returned a {type(model).__name__}; the jax strategy needs a flax.nnx.Module, a Keras model or a "
        "pair of pure functions (init, apply)"
    )


class NNX(Definition):
    """A Flax NNX module. Its Params are trained, random streams are seeded anew, other Variables are buffers."""

    def __init__(self, model: nnx.Module, make: Callable[[], Any] | None) -> None:
        self._module: Any = model
        self._make = make  # where the module holds shapes only
        kind = type(model)
        self._layout: Layout = getattr(kind, "layout", None) or Plain()
        self._tensor_axes: Sequence[tuple[str, int]] | None = getattr(kind, "tensor_axes", None)
        self._split()
        state = nnx.state(model)
        self._tree = jax.tree.structure(state)
        self.variables: list[Variable] = []
        self._paths: list[tuple[tuple[Any, ...], int]] = []  # of each variable: where its module has it, and which leaf
        self._sources: list[Any] = []  # of each leaf: the number of its variable, or what a random stream looks like
        self.random = False
        held = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
        for keys, found in held:
            path = tuple(key.key for key in keys)
            for number, (inner, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(found)[0]):
                if isinstance(found, nnx.RngState):
                    self.random = True
                    self._sources.append(leaf if isinstance(found, nnx.RngKey) else _zeros(leaf))
                    continue
                self._sources.append(len(self.variables))
                self._paths.append((path, number))
                self.variables.append(self._variable(path, inner, found, leaf))

    @property
    def leaks(self) -> bool:
        """True where making the module without memory has left something in it that cannot be used."""
        return any(isinstance(leaf, jax.core.Tracer) for leaf in _static_values(self._graphs[True]))

    def ask_remat(self) -> None:
        """See Definition. A module that can has a switch `remat`."""
        if hasattr(self._module, "remat"):
            self.remat_by_model = True
            self._split()

    def run(
        self, function: Callable[[Any], Any], values: Sequence[Array], key: Array, *, training: bool
    ) -> tuple[Any, list[Array]]:
        """See Definition."""
        model = self._merged(values, key, training=training)
        result = function(model)
        after = dict(nnx.to_flat_state(nnx.state(model)))
        return result, [jax.tree.leaves(after[path])[number] for path, number in self._paths]

    def model(self, values: Sequence[Array], *, training: bool) -> Any:
        """See Definition."""
        return self._merged(values, jnp.zeros(2, jnp.uint32), training=training)

    def first_values(self, chosen: Sequence[int]) -> list[Any]:
        """See Definition."""
        make = self._make
        if make is None:
            values = self._values_of(self._module, chosen)
            self._module = None  # the values are asked for once, and are not to be held here any longer
            return values
        # XLA leaves out what is not asked for, so that parameters take no memory.
        with nnx.use_eager_sharding(False):
            found: list[Any] = jax.jit(lambda: self._values_of(make(), chosen))()
        return found

    def _values_of(self, model: Any, chosen: Sequence[int]) -> list[Any]:
        flat = dict(nnx.to_flat_state(nnx.state(model)))
        leaves = [jax.tree.leaves(flat[path])[number] for path, number in self._paths]
        return [leaves[number] for number in chosen]

    def _split(self) -> None:
        """The module's structure in training and in evaluation mode."""
        self._graphs: dict[bool, Any] = {}
        for training in (False, True):
            (self._module.train if training else self._module.eval)()
            if self.remat_by_model:
                self._module.remat = training  # without a backward pass there is nothing to spare
            self._graphs[training] = nnx.split(self._module)[0]

    def _merged(self, values: Sequence[Array], key: Array, *, training: bool) -> Any:
        streams = itertools.count()
        leaves = [
            values[source] if isinstance(source, int) else _seeded(source, key, next(streams))
            for source in self._sources
        ]
        return nnx.merge(self._graphs[training], jax.tree.unflatten(self._tree, leaves))

    def _variable(self, path: tuple[Any, ...], inner: tuple[Any, ...], found: Any, leaf: Any) -> Variable:
        keys = [str(part) for part in path]
        shape, dtype = tuple(np.shape(leaf)), leaf.dtype
        if not isinstance(found, nnx.Variable):
            return Variable(".".join(keys), "constant", shape, dtype)
        native = ".".join([*keys, *(step_name(part) for part in inner if step_name(part) != "value")])
        name, turn = self._layout.of(native)
        if not isinstance(found, nnx.Param):
            return Variable(name, "buffer", shape, dtype, turn=turn)
        trained = jnp.issubdtype(dtype, jnp.inexact)
        return Variable(name, "param", shape, dtype, trained, turn, self._tensor_axis(name, shape, found))

    def _tensor_axis(self, name: str, shape: tuple[int, ...], found: Any) -> int | None:
        """What the model says of it, by its class or by the variable's own annotation; else a matrix's outputs."""
        if self._tensor_axes is not None:
            return next((axis for pattern, axis in self._tensor_axes if re.fullmatch(pattern, name)), None)
        said = found.get_metadata().get("out_sharding")
        if said is not None:
            return next((axis for axis, names in enumerate(said) if "tensor" in _names(names)), None)
        return len(shape) - 1 if len(shape) > 1 else None


class Pair(Definition):
    """init(key) -> values, and apply(values, ...): the loss function gets a `PairModel` that calls it.

    All values are trained, unless there is a part "params" among others (as flax.linen has it): then it alone.
    """

    random = True

    def __init__(self, init: Callable[..., Any], apply: Callable[..., Any], seed: int) -> None:
        self._init, self._apply, self._seed = init, apply, seed
        shapes = jax.eval_shape(init, jax.random.key(seed))
        flat, self._tree = jax.tree_util.tree_flatten_with_path(shapes)
        parts = isinstance(shapes, Mapping) and "params" in shapes
        self.variables: list[Variable] = []
        for path, leaf in flat:
            words = [step_name(part) for part in path]
            kind = "param" if not parts or words[0] == "params" else "buffer"
            trained = kind == "param" and jnp.issubdtype(leaf.dtype, jnp.inexact)
            outputs = len(leaf.shape) - 1 if trained and len(leaf.shape) > 1 else None
            self.variables.append(
                Variable(".".join(words) or "value", kind, tuple(leaf.shape), leaf.dtype, trained, SAME, outputs)
            )

    def run(
        self, function: Callable[[Any], Any], values: Sequence[Array], key: Array, *, training: bool
    ) -> tuple[Any, list[Array]]:
        """See Definition. Nothing changes the values: apply is pure."""
        model = PairModel(self._apply, jax.tree.unflatten(self._tree, values), _typed(key), training=training)
        return function(model), list(values)

    def model(self, values: Sequence[Array], *, training: bool) -> Any:
        """See Definition."""
        return PairModel(self._apply, jax.tree.unflatten(self._tree, values), jax.random.key(0), training=training)

    def first_values(self, chosen: Sequence[int]) -> list[Any]:
        """See Definition."""
        leaves = jax.tree.leaves(jax.jit(self._init)(jax.random.key(self._seed)))
        return [leaves[number] for number in chosen]


class PairModel:
    """What a loss function gets of a pair: call it as `apply`, without the values."""

    def __init__(self, apply: Callable[..., Any], values: Any, key: Array, *, training: bool) -> None:
        self.apply, self.values = apply, values
        self.key = key  # of jax.random; another one for each micro-batch
        self.training = training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """apply(values, ...)."""
        return self.apply(self.values, *args, **kwargs)


def _host() -> Any:
    """The CPU as a device; None, the default device, where JAX was told to know no CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _typed(key: Array) -> Array:
    """A key of jax.random from (2,) uint32."""
    typed: Array = jax.random.wrap_key_data(key, impl="threefry2x32")
    return typed


def _seeded(like: Any, key: Array, stream: int) -> Any:
    """A key of the same kind and shape as `like`, for the stream of that number; a count begins at zero."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jnp.zeros(like.shape, like.dtype)
    implementation = jax.random.key_impl(like) if isinstance(like, Array) else like.dtype._impl
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=implementation))).shape
    bits = jax.random.bits(jax.random.fold_in(_typed(key), stream), (*like.shape, *words), jnp.uint32)
    return jax.random.wrap_key_data(bits, impl=implementation)


def _zeros(like: Any) -> Any:
    return jax.ShapeDtypeStruct(like.shape, like.dtype)


def step_name(part: Any) -> str:
    """A step of a path in a tree of JAX's."""
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)


def _names(axes: Any) -> tuple[str, ...]:
    return axes if isinstance(axes, tuple) else (axes,)


def _static_values(graph: Any) -> list[Any]:
    """What a module's structure holds by value."""
    return [getattr(attribute, "value", None) for _, attribute in graph.attributes]
