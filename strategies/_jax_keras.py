"""What is a Keras 3 model on the JAX backend to the jax strategy: variables whose values come from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import Array

from unitrain.models.state_keras import named, state_of
from unitrain.strategies._jax_model import Definition, Variable


class Keras(Definition):
    """A built Keras model. Its trainable variables are trained, the others are buffers; seed generators are seeded."""

    def __init__(self, model: Any) -> None:
        self._model = model
        state = state_of(model)
        self._own = [*state.params.values(), *state.buffers.values()]
        self._seeds = state.seeds
        self.random = bool(state.seeds)
        self._mixed = False
        self.variables = [
            self._variable(name, variable) for name, variable in (*state.params.items(), *state.buffers.items())
        ]

    def run(
        self, function: Callable[[Any], Any], values: Sequence[Array], key: Array, *, training: bool
    ) -> tuple[Any, list[Array]]:
        """See Definition."""
        mapping = list(zip(self._own, values, strict=True))
        for number, state in enumerate(self._seeds):
            stream = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), number)
            mapping.append((state, jax.random.bits(stream, (2,), jnp.uint32).astype(state.dtype)))
        if any(value.dtype == jnp.bfloat16 for value in values):
            self._compute_in_bf16()
        before, self._model.training = self._model.training, training
        try:
            with keras.StatelessScope(state_mapping=mapping) as scope:
                result = function(self._model)
        finally:
            self._model.training = before
        buffers = [own for own in self._own if not own.trainable]
        trained = len(values) - len(buffers)
        after = [
            scope.get_current_value(own).astype(old.dtype) for own, old in zip(buffers, values[trained:], strict=True)
        ]
        return result, [*values[:trained], *after]

    def model(self, values: Sequence[Array], *, training: bool) -> Any:
        """See Definition."""
        for own, value in zip(self._own, values, strict=True):
            own.assign(value)
        self._model.training = training
        return self._model

    def first_values(self, chosen: Sequence[int]) -> list[Any]:
        """See Definition."""
        return [self._own[number].value for number in chosen]

    def _compute_in_bf16(self) -> None:
        """Have layers cast what they are given: Keras computes in fp32 where a layer says so, whatever the weights."""
        if not self._mixed:
            self._mixed = True
            for layer in self._model._flatten_layers():
                if layer.dtype_policy.name == "float32":
                    layer.dtype_policy = "mixed_bfloat16"

    def _variable(self, name: str, own: Any) -> Variable:
        turn = named(self._model, own).turn
        shape, dtype = tuple(own.shape), own.value.dtype
        if not own.trainable:
            return Variable(name, "buffer", shape, dtype, turn=turn)
        outputs = len(shape) - 1 if len(shape) > 1 else None
        return Variable(name, "param", shape, dtype, True, turn, outputs)
