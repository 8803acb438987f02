"""What the strategy `ray` refuses, and what to use instead. Imports neither Ray nor a framework."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from unitrain import registry
from unitrain.errors import UnknownName, did_you_mean
from unitrain.recipe import Recipe, StrategyRecipe
from unitrain.strategy import Cluster, Problem

PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
# Strategies whose ranks want more of whoever starts them than an actor is told.
UNABLE = {"horovod": "its ranks are started by horovodrun, MPI or our agent"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """`strategy.options` of `ray`."""

    inner: str = "ddp"  # what the actors run among themselves
    inner_options: Mapping[str, Any] | None = None  # that strategy's own
    actors: int | None = None  # None: launcher.nodes times launcher.nproc
    min_actors: int | None = None  # the fewest that go on when others are lost for good; None: all
    address: str | None = None  # of a running cluster; None: RAY_ADDRESS, else a private one on this machine
    placement: str = "PACK"
    cpus: float = 1.0  # of one actor
    gpus: float | None = None  # of one actor; None: 1 where the cluster has any, else 0
    resources: Mapping[str, float] | None = None  # custom ones of one actor, as Ray names them
    threads: int | None = None  # of one actor; None: as our agent would share the cores of a machine
    object_store_mb: float = 200.0  # of a private cluster
    room_seconds: float = 60.0  # that places for all actors are waited for, at the start and after a loss
    start_seconds: float = 300.0  # that actors may take to start and to build the models
    step_seconds: float = 1800.0  # that one update may take
    silent_seconds: float = 60.0  # after which an actor that answers nothing counts as lost
    snapshot_every: int = 100  # updates between copies of the state in memory, from which lost actors go on; 0: none
    replacements: int = 3  # groups in a row that may be lost at the same update

    @classmethod
    def of(cls, recipe: Recipe) -> Options:
        """Those of a recipe that `ray` has found nothing against."""
        return cls(**recipe.strategy.options)


_KINDS: Mapping[str, tuple[type, ...]] = {
    "inner": (str,),
    "inner_options": (Mapping,),
    "actors": (int,),
    "min_actors": (int,),
    "address": (str,),
    "placement": (str,),
    "cpus": (int, float),
    "gpus": (int, float),
    "resources": (Mapping,),
    "threads": (int,),
    "object_store_mb": (int, float),
    "room_seconds": (int, float),
    "start_seconds": (int, float),
    "step_seconds": (int, float),
    "silent_seconds": (int, float),
    "snapshot_every": (int,),
    "replacements": (int,),
}
_LEAST = {
    **dict.fromkeys(("actors", "min_actors", "threads"), 1),
    **dict.fromkeys(("cpus", "gpus", "room_seconds", "snapshot_every", "replacements"), 0),
    **dict.fromkeys(("start_seconds", "step_seconds", "silent_seconds"), 1),
    "object_store_mb": 76,  # Ray's own limit is 75 MiB
}


def ray(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Strategy ray: its own options, and what the inner strategy says of so many ranks."""
    options = recipe.strategy.options
    problems = [*_options(options)]
    if problems:
        return problems
    wanted = Options.of(recipe)
    problems += _inner(wanted.inner)
    actors = num_actors(recipe)
    if actors > recipe.train.global_batch:
        what = f"{actors} actors cannot share a batch of {recipe.train.global_batch} samples"
        problems.append(
            Problem(what, f"use at most {recipe.train.global_batch} actors, or a larger train.global_batch")
        )
    if wanted.min_actors is not None and wanted.min_actors > actors:
        what = f"strategy.options.min_actors is {wanted.min_actors} of {actors} actors"
        problems.append(Problem(what, f"give a number from 1 to {actors}"))
    for name in ("min_nproc", "min_nodes"):
        if name in recipe.launcher.options:
            what = f"launcher.options.{name} is of ranks that the launcher starts, and strategy ray has one process"
            problems.append(Problem(what, "set strategy.options.min_actors"))
    if not problems:
        problems += _of_inner(recipe, wanted, actors)
    return problems


def num_actors(recipe: Recipe) -> int:
    """How many actors a recipe asks for."""
    asked = recipe.strategy.options.get("actors")
    return asked if type(asked) is int else recipe.launcher.nodes * recipe.launcher.nproc


def with_inner(recipe: Recipe) -> Recipe:
    """The recipe as the actors have it."""
    return recipe.replace(strategy=registry.inner(recipe.strategy))


def _options(options: Mapping[str, Any]) -> Iterator[Problem]:
    known = [field.name for field in fields(Options)]
    for name, value in options.items():
        where = f"strategy.options.{name}"
        if name not in known:
            what = f"{where} is no option of strategy ray{did_you_mean(name, known)}"
            yield Problem(what, f"use one of {', '.join(known)}; what is the inner strategy's goes to inner_options")
        elif value is None:
            continue
        elif not isinstance(value, _KINDS[name]) or isinstance(value, bool):
            yield Problem(f"{where} is {value!r}", f"give a {_KINDS[name][-1].__name__.lower()}")
        elif isinstance(value, int | float) and not _LEAST[name] <= value < math.inf:
            yield Problem(f"{where} is {value}", f"give at least {_LEAST[name]}")
    if (placement := options.get("placement", "PACK")) not in PLACEMENTS:
        yield Problem(f"strategy.options.placement is {placement!r}", f"use one of {', '.join(PLACEMENTS)}")


def _inner(name: str) -> Iterator[Problem]:
    able = [known for known, entry in registry.STRATEGIES.items() if known not in UNABLE and not entry.inner]
    try:
        entry = registry.known("strategies", name)
    except UnknownName as error:
        yield Problem(f"strategy.options.inner: {error}", f"use one of {', '.join(able)}")
        return
    if entry.inner:
        yield Problem(f"strategy.options.inner is {name!r} itself", f"use one of {', '.join(able)}")
    elif name in UNABLE:
        yield Problem(f"strategy {name} cannot run in actors: {UNABLE[name]}", f"use one of {', '.join(able)}")
    elif not entry.installed:
        what = f"strategy.options.inner is {name!r}, which needs {entry.package}"
        install = entry.install or f"pip install 'unitrain[{entry.extra}]'"
        yield Problem(what, f"install it: {install}")


def _of_inner(recipe: Recipe, wanted: Options, actors: int) -> list[Problem]:
    entry = registry.known("strategies", wanted.inner)
    if not entry.problems:
        return []  # a third party's class says it, when it is imported
    inner = recipe.replace(strategy=StrategyRecipe(name=wanted.inner, options=dict(wanted.inner_options or {})))
    found: list[Problem] = registry.resolve(entry.problems)(inner, Cluster(nodes=1, nproc=actors))
    return [
        Problem(
            problem.what.replace("strategy.options", "strategy.options.inner_options"),
            problem.instead.replace("strategy.options", "strategy.options.inner_options"),
        )
        for problem in found
    ]
