"""`unitrain verify`: the same recipe on every strategy that can run here, compared with one process."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ExitCode, MissingExtra, UserError
from .launch import Overrides


class Precision(StrEnum):
    """Of the compute; the words of train.precision."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class TierName(StrEnum):
    """How near runs must be."""

    TIGHT = "tight"
    CLOSE = "close"
    BAND = "band"


def verify(
    recipe_path: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    overrides: Overrides = None,
    strategies: Annotated[
        str, typer.Option("--strategies", metavar="NAMES", help="`all` that can run here, or names: ddp,fsdp2.")
    ] = "all",
    nproc: Annotated[int, typer.Option("--nproc", metavar="N", min=1, help="Ranks of each strategy.")] = 2,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Optimizer steps of each run.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="For the runs and the report; else runs/<name>-verify-<time>-<id>."),
    ] = None,
    precision: Annotated[Precision | None, typer.Option("--precision", help="In place of train.precision.")] = None,
    tier: Annotated[
        TierName | None, typer.Option("--tier", help="In place of the tier that the recipe itself suggests.")
    ] = None,
) -> None:
    """Train a recipe on every strategy and compare losses and weights with those of one process.

    Ends with 70 where a run fails or is further from `single` than its tier allows; docs/verify.md tells the tiers.
    """
    from ..recipe_file import load_recipe
    from ..run import RUNS, new_id
    from ..verify.figure import draw
    from ..verify.plan import make_plan
    from ..verify.table import show
    from ..verify.trial import Interrupted
    from ..verify.verification import FILE, as_json, verify

    given = [f"train.precision={precision.value}"] if precision else []
    recipe = load_recipe(recipe_path, [*given, *(overrides or [])])
    plan = make_plan(recipe, strategies, nproc, steps, tier.value if tier else None)
    root = out or RUNS / new_id(f"{recipe.name}-verify")
    refuse_taken(root)
    try:
        found = verify(plan, root, lambda line: print(line, flush=True))
    except Interrupted as stopped:
        raise typer.Exit(stopped.exit_code) from None
    (root / FILE).write_text(as_json(found, plan), encoding="utf-8")
    print()
    show(found)
    picture = root / "verify.png"
    reference, *others = found.rows
    compared = [(row.outcome, row.comparison) for row in others if row.comparison is not None]
    said = str(root / FILE)
    if compared:
        title = f"{recipe.name}, {steps} steps, {plan.reference.recipe.train.precision}"
        try:
            draw(picture, title, reference.outcome, compared)
            said += f", {picture}"
        except MissingExtra as error:
            print(f"no picture: {error}")
    print(f"{'passed' if found.passed else 'failed'}: {said}")
    if not found.passed:
        raise typer.Exit(ExitCode.FAILED)


def refuse_taken(root: Path) -> None:
    """Raise UserError unless the folder is empty or not there."""
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        raise UserError(f"{root} is not an empty folder; name another with --out")
