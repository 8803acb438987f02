"""What the strategy `tensorflow` refuses, and what to use instead. Imports no framework, so that a launch can ask."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from unitrain.errors import did_you_mean
from unitrain.recipe import Recipe
from unitrain.strategy import Cluster, Problem

# option -> what it may be; the first is the default
OPTIONS: Mapping[str, tuple[str | bool, ...]] = MappingProxyType({
    "communication": ("auto", "ring", "nccl"),
    "jit_compile": (False, True),
})  # fmt: skip


def tensorflow(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `tensorflow`."""
    found = []
    for name, value in recipe.strategy.options.items():
        if name not in OPTIONS:
            what = f"strategy 'tensorflow' has no option {name!r}{did_you_mean(name, OPTIONS)}"
            found.append(Problem(what, f"known: {', '.join(sorted(OPTIONS))}"))
        elif not any(value is choice or (value == choice and isinstance(value, str)) for choice in OPTIONS[name]):
            choices = ", ".join(str(choice).lower() for choice in OPTIONS[name])
            found.append(Problem(f"strategy.options.{name} is {value!r}", f"use one of {choices}"))
    if recipe.train.precision == "fp16":
        what = "strategy 'tensorflow' has no train.precision=fp16: it scales no losses"
        found.append(Problem(what, "use train.precision=bf16, or fp16 with --strategy ddp or fsdp2"))
    return found
