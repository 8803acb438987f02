"""What does a user's Keras 3 model consist of, by which names, and what does it begin with? Alike on every backend.

Keras makes up names by counting the layers of a process, draws first values by the backend's own generator, and
runs a model that is called without `training=` as in inference. Here each of these is a function of the model.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras.src.backend.common import global_state
from numpy.typing import NDArray

from ..cursor import mix
from ..errors import UserError
from .initial import generator
from .layout import Layout, Named, Plain

Initializers = dict[int, tuple[Any, Any]]  # id of a variable -> the variable, and what initialised it
TWO_SIGMA_STD = 0.87962566103423978  # of a unit normal whose values beyond 2 were drawn again


class State(NamedTuple):
    """The variables of a Keras model by canonical name, in Keras's order."""

    params: dict[str, Any]  # trainable
    buffers: dict[str, Any]  # not trainable: running statistics, frozen weights
    seeds: list[Any]  # (2,) integers each: states of seed generators, in no checkpoint


class InMode:
    """Mixed into a Keras model: called without `training=`, it runs as its attribute `training` says."""

    training: bool
    _known: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See keras.Layer."""
        if kwargs.get("training") is None:
            kwargs["training"] = bool(self.training)
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]  # keras.Layer's
        if len(self.variables) != self._known:  # type: ignore[attr-defined]  # keras.Layer's
            raise UserError(
                f"the Keras model {self.name!r} made variables when it was first called; make them all in "  # type: ignore[attr-defined]
                "build_model: call model.build(shape), or the model once on an example, before you return it"
            )
        return output


@contextlib.contextmanager
def watched() -> Iterator[Initializers]:
    """Layers made meanwhile are counted from zero, and what initialises their variables is written down."""
    counts = global_state.get_global_attribute("object_name_uids")
    original = keras.Variable._initialize_with_initializer
    found: Initializers = {}

    def initialize(variable: Any, initializer: Any) -> None:
        found[id(variable)] = (variable, initializer)
        original(variable, initializer)

    inherited = "_initialize_with_initializer" not in vars(keras.Variable)
    keras.Variable._initialize_with_initializer = initialize
    global_state.set_global_attribute("object_name_uids", collections.defaultdict(int))
    try:
        yield found
    finally:
        global_state.set_global_attribute("object_name_uids", counts)
        keras.Variable._initialize_with_initializer = original
        if inherited:
            del keras.Variable._initialize_with_initializer


def prepare(model: Any, initializers: Initializers, seed: int) -> None:
    """Check a model that was made while it was watched, give it first values, and have it follow `training`."""
    state = state_of(model)
    for name, variable in (state.params | state.buffers).items():
        _, initializer = initializers.get(id(variable), (None, None))
        values = drawn(initializer, name, tuple(variable.shape), seed)
        if values is not None:
            variable.assign(values)
    mix_in(model, InMode)
    model.training = False
    model._known = len(model.variables)


def mix_in(model: Any, base: type) -> None:
    """Give one object the methods of a class, before its own; it stays an instance of its class."""
    kind: Any = type(model)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    model.__class__ = type(kind)(kind.__name__, (base, kind), names)


def state_of(model: Any) -> State:
    """The state of a model that is built. Raises UserError where it is not, or two variables have one name."""
    if not model.built or not model.weights:
        raise UserError(
            f"build_model returned the Keras model {model.name!r} without weights; begin it with keras.Input, or call "
            "model.build(shape) before you return it"
        )
    params: dict[str, Any] = {}
    buffers: dict[str, Any] = {}
    for variable in model.weights:
        name = named(model, variable).name
        if name in params or name in buffers:
            raise UserError(
                f"two variables of the Keras model {model.name!r} are called {name!r}; give each layer a name of its "
                "own, and build layers in build() instead of __init__()"
            )
        (params if variable.trainable else buffers)[name] = variable
    weights = {id(variable) for variable in model.weights}
    return State(params, buffers, [variable for variable in model.variables if id(variable) not in weights])


def named(model: Any, variable: Any) -> Named:
    """A variable's canonical name, and how its axes become the canonical ones."""
    layout: Layout = getattr(type(model), "layout", Plain())
    return layout.of(variable.path.removeprefix(f"{model.name}/"))


def seed_values(key: int, number: int) -> NDArray[np.int64]:
    """(number, 2) integers below 2**31: what seed generators start from in a micro-batch with that key."""
    words = [mix(key, place) for place in range(number)]
    return np.array([(word % 2**31, (word >> 32) % 2**31) for word in words], dtype=np.int64).reshape(number, 2)


def drawn(initializer: Any, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32] | None:
    """First values as Keras's initializer describes them, the same on every backend; None where nothing is random.

    None also for an initializer of the user's own, whose values are then what the backend drew. A `seed` of the
    initializer does not count: the recipe's seed and the variable's name decide.
    """
    kinds = keras.initializers
    own = next((kind for kind in _RANDOM if type(initializer).__call__ is kind.__call__), None)
    if own is None:
        return None
    random = generator(name, seed)  # the initializer's own seed is often one that Keras drew
    if own is kinds.RandomNormal:
        values = initializer.mean + initializer.stddev * random.standard_normal(shape)
    elif own is kinds.RandomUniform:
        values = random.uniform(initializer.minval, initializer.maxval, shape)
    elif own is kinds.TruncatedNormal:
        values = initializer.mean + initializer.stddev * _within_two_sigma(random, shape)
    elif own is kinds.OrthogonalInitializer:
        values = initializer.gain * _orthogonal(random, shape)
    else:
        values = _scaled(initializer, random, shape)
    return np.asarray(values, dtype=np.float32)


_RANDOM = (
    keras.initializers.RandomNormal,
    keras.initializers.RandomUniform,
    keras.initializers.TruncatedNormal,
    keras.initializers.OrthogonalInitializer,
    keras.initializers.VarianceScaling,  # Glorot, He and LeCun are of its kind
)


def _within_two_sigma(random: np.random.Generator, shape: Sequence[int]) -> NDArray[np.float64]:
    values = random.standard_normal(shape)
    while (beyond := np.abs(values) > 2).any():
        values[beyond] = random.standard_normal(int(beyond.sum()))
    return values


def _orthogonal(random: np.random.Generator, shape: Sequence[int]) -> NDArray[np.float64]:
    """Saxe et al., "Exact solutions to the nonlinear dynamics of learning", 2013; the last axis are the columns."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    q, r = np.linalg.qr(random.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * np.sign(np.diag(r))  # or the distribution would not be uniform
    return np.reshape(q.T if rows < columns else q, shape)


def _scaled(initializer: Any, random: np.random.Generator, shape: Sequence[int]) -> NDArray[np.float64]:
    """Glorot and Bengio, 2010, and He et al., 2015: a variance by the numbers of inputs and outputs."""
    inputs, outputs = _fans(shape, initializer)
    number = {"fan_in": inputs, "fan_out": outputs}.get(initializer.mode, (inputs + outputs) / 2)
    std = math.sqrt(initializer.scale / max(1.0, number))
    if initializer.distribution == "truncated_normal":
        return std / TWO_SIGMA_STD * _within_two_sigma(random, shape)
    if initializer.distribution == "untruncated_normal":
        return std * random.standard_normal(shape)
    return random.uniform(-math.sqrt(3) * std, math.sqrt(3) * std, shape)


def _fans(shape: Sequence[int], initializer: Any) -> tuple[float, float]:
    from keras.src.initializers.random_initializers import compute_fans

    axes = {key: getattr(initializer, key) for key in ("input_axes", "output_axes") if hasattr(initializer, key)}
    inputs, outputs = compute_fans(tuple(shape), **axes)
    return float(inputs), float(outputs)
