"""How does a Keras 3 model on the torch backend become a module that the torch strategies can train?

Its layers are torch modules, but each lists the variables of all layers below it, running statistics and the states
of seed generators among them. Here the model alone holds parameters and buffers, once, by their canonical names.
"""

from __future__ import annotations

from typing import Any

import keras
import torch
from keras.src.random.seed_generator import global_seed_generator
from torch import Tensor, nn

from unitrain.errors import Refused
from unitrain.models.layout import SAME
from unitrain.models.state_keras import mix_in, named, seed_values, state_of


def adopt(model: Any) -> nn.Module:
    """The same Keras model, with parameters and buffers by their canonical names at its root."""
    state = state_of(model)
    turned = [found.name for variable in model.weights if (found := named(model, variable)).turn != SAME]
    if turned:
        raise Refused(
            f"the layout of the Keras model {model.name!r} turns the axes of {turned[0]!r}, and torch strategies do "
            "not; leave the axes as Keras has them, or use --strategy jax or tensorflow"
        )
    for layer in model._flatten_layers():
        layer._modules["_torch_params"] = nn.ParameterDict()  # Keras asks whether there is one
    for name, variable in (state.params | state.buffers).items():
        value: Tensor = variable.__dict__.pop("_value")
        if variable.trainable:
            model._parameters[name] = value
        else:
            model._buffers[name] = value.detach()
        variable.__dict__.update(_owner=model, _name_there=name)
        variable.__class__ = Housed
    mix_in(model, OnTorch)
    model._first_buffers = {name: buffer.cpu().clone() for name, buffer in model._buffers.items()}
    # Last, the one that Keras draws from where nothing says which.
    model._seeds = [*(variable._value for variable in state.seeds), global_seed_generator().state._value]
    module: nn.Module = model
    return module


class Housed(keras.Variable):  # type: ignore[misc]  # Keras has no types
    """A variable whose value is a parameter or buffer of the model: sharding strategies put others in their place."""

    @property
    def _value(self) -> Tensor:
        owner = self.__dict__["_owner"]
        name = self.__dict__["_name_there"]
        held = owner._parameters if self._trainable else owner._buffers
        value: Tensor = held[name]
        return value


class OnTorch:
    """Mixed into a Keras model: what torch strategies ask of a model beyond a module's own methods."""

    _first_buffers: dict[str, Tensor]
    _seeds: list[Tensor]
    _buffers: dict[str, Tensor]

    def manual_seed(self, key: int) -> None:
        """Have dropout draw as this key says, whatever was drawn before."""
        for state, value in zip(self._seeds, seed_values(key, len(self._seeds)), strict=True):
            state.copy_(torch.from_numpy(value))

    def reset_buffers(self) -> None:
        """Give buffers the values that they began with."""
        for name, value in self._first_buffers.items():
            self._buffers[name].copy_(value)

    def sharding_units(self) -> list[nn.Module]:
        """None: the model alone has parameters, so they are gathered and freed as one."""
        return []
