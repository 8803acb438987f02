"""What a drill will do: the recipe as both runs train it, and its faults in order; refused where it cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

from ..errors import UserError
from ..policy import due
from ..recipe import Recipe
from ..recipe_file import check
from .faults import KINDS, Corrupt, Fault, FullDisk, Kill, Stop

NEWEST = "newest"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One recipe, and what goes wrong while it trains."""

    recipe: Recipe
    faults: tuple[Fault, ...]  # those of a step in the order of steps; a full disk comes with its save

    @property
    def saves(self) -> int:
        """How many checkpoints an undisturbed run leaves behind it."""
        return num_saves(self.recipe)


def make_plan(recipe: Recipe, asked: Mapping[str, Iterable[str]]) -> Plan:
    """Check everything before anything starts. `asked`: option -> its values. Raises UserErrors."""
    if recipe.launcher.nodes != 1:
        raise UserError(f"chaos runs on this machine, and launcher.nodes is {recipe.launcher.nodes}; set --nodes 1")
    if not recipe.checkpoint.every:
        raise UserError(
            "without checkpoints on the way every fault costs the whole run; give checkpoint.every=N, fewer than "
            f"train.steps={recipe.train.steps}"
        )
    recipe = recipe.replace(
        train=replace(recipe.train, log_every=1),
        launcher=replace(recipe.launcher, name="local", options={}),
        checkpoint=replace(recipe.checkpoint, path=None),
    )
    check(recipe, with_strategy=True)
    faults = [parse(kind, text, recipe) for kind in KINDS for text in asked.get(kind.option, ())]
    if not faults:
        known = " ".join(f"--{kind.option} {kind.example}" for kind in KINDS)
        raise UserError(f"nothing is to go wrong; say what, for example {known}")
    for fault in faults:
        _refuse(fault, recipe)
    return Plan(recipe=recipe, faults=tuple(sorted(faults, key=lambda fault: getattr(fault, "step", 0))))


def parse(kind: type[Fault], text: str, recipe: Recipe) -> Fault:
    """A fault from what the command line says of it: `rank=1,step=7`. Raises UserError."""
    names = [field.name for field in fields(kind)]
    example = f"--{kind.option} {kind.example}"
    words = [word.strip() for word in text.split(",")]
    if kind is Corrupt:
        if words.pop(0) != NEWEST:
            raise UserError(f"--{kind.option} {text}: only the newest checkpoint can be damaged, as in {example}")
        if not words:  # late, and when there is an older one to go back to
            words = [f"step={max(3 * recipe.train.steps // 4, (recipe.checkpoint.every or 0) + 1)}"]
    values: dict[str, int] = {}
    for word in words:
        found = re.fullmatch(r"(\w+)=(\d+)", word)
        if found is None or found[1] not in names or found[1] in values:
            raise UserError(f"--{kind.option} {text}: {word!r} is not understood; write {example}")
        values[found[1]] = int(found[2])
    if absent := [name for name in names if name not in values]:
        raise UserError(f"--{kind.option} {text} has no {' and no '.join(absent)}; write {example}")
    return kind(**values)


def num_saves(recipe: Recipe) -> int:
    """Checkpoints of a run from its beginning to its end."""
    steps = recipe.train.steps
    return sum(due(step, recipe.checkpoint.every, steps) for step in range(1, steps + 1))


def _refuse(fault: Fault, recipe: Recipe) -> None:
    steps, ranks, every = recipe.train.steps, recipe.launcher.nproc, recipe.checkpoint.every or 0
    if isinstance(fault, FullDisk):
        if not 1 <= fault.save < num_saves(recipe):  # after the last one nothing is left to go on with
            possible = f"1 to {num_saves(recipe) - 1}" if num_saves(recipe) > 1 else "none"
            raise UserError(f"--{fault}: the run goes on after {possible} of its {num_saves(recipe)} saves")
        return
    step, rank = getattr(fault, "step", 1), getattr(fault, "rank", 0)
    if not 1 <= step < steps:
        raise UserError(f"--{fault}: the run has {steps} steps; name one from 1 to {steps - 1}")
    if not 0 <= rank < ranks:
        raise UserError(f"--{fault}: the run has {ranks} ranks; name one from 0 to {ranks - 1}, or give --nproc")
    if isinstance(fault, Corrupt) and (step <= every or recipe.checkpoint.keep < 2):
        raise UserError(
            f"--{fault}: there is no older checkpoint to go back to; name a step after the first save "
            f"(checkpoint.every is {every}), and keep two (checkpoint.keep is {recipe.checkpoint.keep})"
        )
    if isinstance(fault, Kill | Stop) and recipe.recovery.restarts == 0:
        raise UserError(f"--{fault}: recovery.restarts is 0, so nothing is started again; set it to 1 or more")
