"""`unitrain doctor`: is this machine, or are the nodes of a launcher, fit to train?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import complete
from .launch import INTERRUPTED, AsJson, Overrides
from .listing import print_json

if TYPE_CHECKING:
    from ..doctor.finding import Row

UNFIT = 1
_COLORS = {"pass": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}


def doctor(
    overrides: Overrides = None,
    recipe_path: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Whose launcher, nodes and options to take.")
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            "--launcher", metavar="NAME", help="Whose nodes; else this machine.", autocompletion=complete.launchers
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", "-N", metavar="N", min=1, help="How many.")] = None,
    nproc: Annotated[int | None, typer.Option("--nproc", metavar="N", min=1, help="Ranks on each node.")] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="A folder to check, where runs would go; else one in ./runs."),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=1, help="For the nodes to come and answer.")
    ] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Check this machine, or as a job the nodes that a launcher gives: versions, network, disks, limits.

    Each check passes, warns or fails, with a line that mends it. Ends with 0 where none failed, else with 1.
    """
    from ..doctor.finding import Verdict, rows, worst
    from ..doctor.machine import leftovers
    from ..doctor.visit import recipe_for, remove, visit
    from ..recipe_file import load_recipe, recipe_from_text
    from ..world import environment

    changes = [f"launcher.name={launcher}"] if launcher else []
    changes += [f"launcher.{key}={count}" for key, count in (("nodes", nodes), ("nproc", nproc)) if count]
    changes += overrides or []
    recipe = (
        recipe_from_text("trainer: none:None", overrides=changes)
        if recipe_path is None
        else load_recipe(recipe_path, changes)
    )
    try:
        found = visit(recipe_for(recipe.launcher), run_dir, patience_seconds=timeout, say=_say)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    table = rows([*leftovers(environment()), *found.findings])
    fit = worst(table) is not Verdict.FAIL
    if fit:
        remove(found.run)
    if as_json:
        folder = None if fit else str(found.run.folder)
        checks = [{**asdict(row), "nodes": list(row.nodes)} for row in table]
        print_json({"ok": fit, "verdict": worst(table), "checks": checks, "folder": folder})
    else:
        _print(table)
        counts = {verdict: sum(row.verdict == verdict for row in table) for verdict in Verdict}
        print(", ".join(f"{count} {_WORDS[verdict]}" for verdict, count in counts.items() if count))
        if not fit:
            print(f"the job's folder stays: {found.run.folder}")
    if not fit:
        raise typer.Exit(UNFIT)


_WORDS: dict[str, str] = {"pass": "passed", "warn": "warned", "fail": "failed"}


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _print(table: list[Row]) -> None:
    everywhere = {row.nodes for row in table if row.verdict == "pass"}
    most = max((len(nodes) for nodes in everywhere), default=0)
    for row in table:
        where = f" (on {', '.join(row.nodes)})" if row.nodes and len(row.nodes) < most else ""
        typer.echo(f"{typer.style(row.verdict, fg=_COLORS[row.verdict])}  {row.check:<14} {row.found}{where}")
        if row.fix:
            typer.echo(f"      {'':<14} -> {row.fix}")
