"""How a role's model comes to be on a rank: built, filled with initial values, and prepared in place."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unitrain.errors import UserError
from unitrain.keras_backend import build_any, is_keras
from unitrain.strategy import Role


def build_model(role: Role, seed: int, device: torch.device) -> nn.Module:
    """The role's model on this device, the same on every rank."""
    if role.initial is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _made(role, seed).to(device)
    model = empty_model(role)
    materialize(model, device)
    fill_initial(model, role, seed)
    return model


def empty_model(role: Role) -> nn.Module:
    """The role's model without memory (on the meta device), for models whose role gives initial values."""
    with torch.device("meta"):
        return _made(role, 0).to("meta")  # Keras says itself where its tensors are to be


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a model that was built empty memory without values; parameters that modules share stay shared."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    model.to_empty(device=device)
    for first, *others in names.values():
        for other in others:
            owner, _, attribute = other.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(first))


@torch.no_grad()
def fill_initial(
    model: nn.Module,
    role: Role,
    seed: int,
    local: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    offset: Callable[[Tensor], tuple[int, ...] | None] = lambda tensor: None,
) -> None:
    """Write initial values into this rank's part of every parameter, and reset the buffers.

    A model may say how by a method `reset_buffers()`; otherwise each module that has buffers must have
    `reset_running_stats()`, as batch norms do.
    """
    assert role.initial is not None, "checked by the caller"
    for name, param in model.named_parameters():
        values = torch.from_numpy(role.initial(name, tuple(param.shape), seed))
        part, begin = local(param), offset(param)
        if begin is not None:
            values = values[tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))]
        part.copy_(values)
    reset_buffers(model)


def reset_buffers(model: nn.Module) -> None:
    """Set the buffers of a model that was built empty, as `fill_initial` describes."""
    own: Any = getattr(model, "reset_buffers", None)
    if own is not None:
        own()
        return
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            # A module that has buffers must know how to set them: nothing else does once it was built empty.
            reset: Any = module.reset_running_stats  # batch norms have it
            reset()


def apply_model_options(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Activation checkpointing and torch.compile, in place: the names of parameters stay as they are."""
    for unit in sharding_units(model) or [model]:
        if options.get("activation_checkpointing"):
            unit.forward = functools.partial(_checkpointed, unit.forward)
        if options.get("compile"):
            unit.compile()


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: what it says itself, or the members of its module lists."""
    own: Any = getattr(model, "sharding_units", None)
    if own is not None:
        return list(own())
    return [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]


def separate_units(model: nn.Module) -> list[nn.Module]:
    """The blocks that can be cut by themselves: those whose parameters no module beside them has too."""
    everywhere = _occurrences(model)
    return [
        unit
        for unit in sharding_units(model)
        if all(everywhere[param] == times for param, times in _occurrences(unit).items())
    ]


def _occurrences(module: nn.Module) -> Counter[int]:
    """The number of places that each parameter, by its id, has."""
    return Counter(id(param) for _, param in module.named_parameters(remove_duplicate=False))


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _made(role: Role, seed: int) -> nn.Module:
    """What the role's `model` returns; Keras's models are made fit."""
    model = build_any(role.model, "torch", seed)
    if is_keras(model):
        from unitrain.strategies._torch_keras import adopt  # which imports Keras

        return adopt(model)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"build_model returned a {type(model).__name__}; a torch strategy needs a torch.nn.Module or a Keras model"
        )
    return model
