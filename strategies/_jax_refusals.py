"""What strategy `jax` refuses, and what to use instead. Imports no framework, so that a launch can ask at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from unitrain.errors import did_you_mean
from unitrain.recipe import Recipe
from unitrain.strategy import Cluster, Problem

AXES = ("data", "fsdp", "tensor")
OPTIONS = (*AXES, "local_devices", "remat")


class MeshSizes(NamedTuple):
    """Devices along each axis of the mesh."""

    data: int
    fsdp: int
    tensor: int

    @property
    def shards(self) -> int:
        """Parts into which the rows of a batch are cut."""
        return self.data * self.fsdp


def local_devices(options: Mapping[str, Any]) -> int:
    """Devices of one rank."""
    number: int = options.get("local_devices", 1)
    return number


def mesh_sizes(options: Mapping[str, Any], devices: int) -> MeshSizes:
    """The mesh that the options ask for; `data` takes what the others leave."""
    fsdp, tensor = options.get("fsdp", 1), options.get("tensor", 1)
    return MeshSizes(options.get("data", max(devices // (fsdp * tensor), 1)), fsdp, tensor)


def jax(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `jax`."""
    options = recipe.strategy.options
    found = []
    for name in options:
        if name not in OPTIONS:
            what = f"strategy 'jax' has no option {name!r}{did_you_mean(name, OPTIONS)}"
            found.append(Problem(what, f"known: {', '.join(OPTIONS)}"))
    if not isinstance(options.get("remat", False), bool):
        found.append(Problem(f"strategy.options.remat is {options['remat']!r}", "use true or false"))
    if recipe.train.precision == "fp16":
        what = "strategy 'jax' has no train.precision fp16"
        found.append(Problem(what, "use bf16, which needs no loss scale, or --strategy ddp or fsdp2"))
    counts = {name: options[name] for name in (*AXES, "local_devices") if name in options}
    wrong = {name: count for name, count in counts.items() if type(count) is not int or count < 1}
    for name, count in wrong.items():
        found.append(Problem(f"strategy.options.{name} is {count!r}", "use a whole number, 1 or more"))
    return found if wrong else [*found, *_mesh(options, cluster)]


def _mesh(options: Mapping[str, Any], cluster: Cluster) -> Iterator[Problem]:
    each = local_devices(options)
    devices = cluster.ranks * each
    sizes = mesh_sizes(options, devices)
    have = f"{devices} device{'s' if devices > 1 else ''} ({cluster.ranks} ranks of {each})"
    if math.prod(sizes) != devices:
        asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        yield Problem(
            f"a mesh of {asked} has {math.prod(sizes)} devices, and there are {have}", _fitting(sizes, devices)
        )
    elif sizes.tensor % each and each % sizes.tensor:
        what = f"strategy.options.tensor={sizes.tensor} would cut the {each} devices of a rank across two groups"
        yield Problem(what, f"use a divisor or a multiple of {each}, or another local_devices")


def _fitting(asked: MeshSizes, devices: int) -> str:
    """The nearest mesh of that many devices, and how many devices the asked one needs."""
    tensor = math.gcd(asked.tensor, devices)
    fsdp = math.gcd(asked.fsdp, devices // tensor)
    fits = {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
    mesh = ",".join(f"{name}={size}" for name, size in fits.items() if size > 1 or name == "data")
    return f"use {mesh}, or {math.prod(asked)} ranks of one device"
