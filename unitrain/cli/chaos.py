"""`unitrain chaos`: disturb a run on purpose, and compare its end with that of one that nobody disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ExitCode
from .launch import INTERRUPTED, Nproc, Overrides, Strategy
from .verifying import refuse_taken

Many = list[str] | None


def chaos(
    recipe_path: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    overrides: Overrides = None,
    strategy: Strategy = None,
    nproc: Nproc = None,
    kill: Annotated[Many, typer.Option(metavar="rank=R,step=N", help="SIGKILL a rank after step N.")] = None,
    sigterm: Annotated[Many, typer.Option(metavar="step=N", help="Stop the run by SIGTERM, and resume it.")] = None,
    stop: Annotated[Many, typer.Option(metavar="rank=R,step=N", help="SIGSTOP a rank: it hangs.")] = None,
    corrupt: Annotated[
        Many, typer.Option(metavar="newest[,step=N]", help="Stop it, damage its newest checkpoint, and resume it.")
    ] = None,
    enospc: Annotated[Many, typer.Option(metavar="save=N", help="The disk is full in the N-th save.")] = None,
    patience: Annotated[
        float, typer.Option("--patience", metavar="SECONDS", min=0.1, help="Without any progress: the drill failed.")
    ] = 900.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="For the runs and the report; else runs/<name>-chaos-<time>-<id>."),
    ] = None,
) -> None:
    """Train a recipe twice, the second time with faults, and tell whether anything was lost.

    Each fault may be given several times. Ends with 70 where one is not survived or the two runs end differently;
    docs/chaos.md tells what each fault does.
    """
    from ..chaos.drill import Drill, disk_for, undisturbed
    from ..chaos.plan import make_plan
    from ..chaos.table import show
    from ..chaos.verdict import FILE, as_json, judge
    from ..recipe_file import load_recipe
    from ..run import RUNS, new_id

    recipe = load_recipe(recipe_path, overrides or [], strategy=strategy, launcher="local", nproc=nproc)
    asked = {"kill": kill, "sigterm": sigterm, "stop": stop, "corrupt": corrupt, "enospc": enospc}
    plan = make_plan(recipe, {name: values or [] for name, values in asked.items()})
    root = out or RUNS / new_id(f"{recipe.name}-chaos")
    refuse_taken(root)
    try:
        _say(f"undisturbed: {recipe.strategy.name}, {recipe.launcher.nproc} ranks, {recipe.train.steps} steps ...")
        reference = undisturbed(plan.recipe, root / "undisturbed")
        disk = disk_for(plan, reference, root / "disturbed")
        drill = Drill(plan, root / "disturbed", disk, _say)
        try:
            code = drill.go(patience)
        finally:
            if disk is not None:
                disk.settle()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    found = judge(plan, reference, drill.run, drill.troubles, code)
    (root / FILE).write_text(as_json(found, plan), encoding="utf-8")
    print()
    show(found)
    print(f"{'passed' if found.passed else 'failed'}: {root / FILE}")
    if not found.passed:
        raise typer.Exit(ExitCode.FAILED)


def _say(line: str) -> None:
    print(line, flush=True)
