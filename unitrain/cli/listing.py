"""`unitrain list`: what there is, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UnitrainError

if TYPE_CHECKING:
    from ..run import Run


class Group(StrEnum):
    """What can be listed."""

    STRATEGIES = "strategies"
    LAUNCHERS = "launchers"
    MODELS = "models"
    SOURCES = "sources"
    RUNS = "runs"


def list_names(
    group: Annotated[Group, typer.Argument(metavar="WHAT", help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List strategies, launchers, models, sources, or the runs in ./runs."""
    if group is Group.RUNS:
        from ..run import Run

        summaries = [_summary(run) for run in reversed(Run.all())]
        print_json(summaries) if as_json else _print_runs(summaries)
        return
    found = _registered(group.value)
    if as_json:
        print_json(found)
        return
    columns = ["name", *(["framework"] if group is Group.STRATEGIES else []), "installed", "summary"]
    rows = [{**row, "installed": "yes" if row["installed"] else row["install"]} for row in found]
    print_table(columns, [[row[column] for column in columns] for row in rows])


def print_json(value: Any) -> None:
    """A value for other programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns in capitals, two spaces apart; whole words however wide, so that `grep` and `awk` can read them."""
    table = [[column.upper() for column in columns], *rows]
    widths = [max(len(row[number]) for row in table) for number in range(len(columns))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _registered(group: str) -> list[dict[str, Any]]:
    from ..registry import entries

    return [
        {
            "name": name,
            "framework": entry.framework,
            "installed": entry.installed,
            "install": f"pip install 'unitrain[{entry.extra}]'" if entry.extra else "",
            "summary": entry.summary,
        }
        for name, entry in entries(group).items()
    ]


def _summary(run: Run) -> dict[str, Any]:
    """One run that cannot be read must not hide the others."""
    from .runs import summary

    try:
        return summary(run)
    except UnitrainError as error:
        return {"id": run.id, "folder": str(run.folder), "state": "unreadable", "detail": str(error)}


def _print_runs(summaries: Sequence[dict[str, Any]]) -> None:
    if not summaries:
        print("no runs in ./runs; start one with `unitrain launch RECIPE`")
        return
    from ..track.lines import number

    rows = []
    for run in summaries:
        if run["state"] == "unreadable":
            rows.append([run["id"], run["state"], "", "", run["detail"]])
            continue
        loss = number(run["train"]["loss"]) if run["train"] else ""
        rows.append(
            [run["id"], run["state"], f"{run['step']}/{run['steps']}", loss, f"{run['strategy']} x{run['ranks']}"]
        )
    print_table(["run", "state", "step", "loss", "strategy"], rows)
