"""`unitrain status`, `logs` and `cancel`: looking at a run and stopping it, from any shell."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import complete
from .listing import print_json

if TYPE_CHECKING:
    from ..launcher import JobStatus
    from ..run import Run

Name = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or id.", autocompletion=complete.runs)]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


def status(name: Name, as_json: AsJson = False) -> None:
    """Show how far a run is and whether it still runs."""
    from ..run import Run

    facts = summary(Run.open(name))
    if as_json:
        print_json(facts)
    else:
        _print_status(facts)


def logs(
    name: Name,
    rank: Annotated[int, typer.Option("--rank", metavar="N", min=0, help="Whose log.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object for each line.")] = False,
) -> None:
    """Print the log of one rank, of the newest attempt."""
    from ..run import Run
    from ..submission import launcher_of

    run = Run.open(name)
    for line in launcher_of(run).logs(run.folder, rank=rank, follow=follow):
        text = line.rstrip("\n")
        print(json.dumps({"rank": rank, "line": text}, ensure_ascii=False) if as_json else text, flush=follow)


def cancel(
    name: Name,
    grace: Annotated[
        float, typer.Option("--grace", metavar="SECONDS", min=0, help="Time to save a checkpoint before it is ended.")
    ] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Ask a run to stop, and end it after a grace."""
    from ..run import Run
    from ..submission import Started

    run = Run.open(name)
    started, state = Started.of(run), state_of(run).state
    if started is None or state not in ("pending", "running"):
        raise UserError(f"{run.id} is not running ({state}): nothing to cancel")
    started.cancel(grace_seconds=grace)
    found = started.status()
    if as_json:
        print_json({"id": run.id, "state": found.state, "exit_code": found.exit_code, "detail": found.detail})
    else:
        print(f"{run.id}: {found.state}; go on with `unitrain resume {name}`")


def state_of(run: Run) -> JobStatus:
    """What became of the run's job; `unknown` where no launcher started it."""
    from ..submission import status_of

    return status_of(run)


def summary(run: Run) -> dict[str, Any]:
    """What there is to know of a run, for people and programs."""
    from ..recipe_file import load_recipe
    from ..submission import Started

    recipe, launched, events, metrics = load_recipe(run.recipe_path), run.launched(), run.events(), run.metrics()
    state, started = state_of(run), Started.of(run)
    train = [record for record in metrics if record.get("split") == "train"]
    evaluations = [record for record in metrics if record.get("split") == "eval"]
    saved = [event for event in events if event["event"] == "checkpoint"]
    return {
        "id": run.id,
        "folder": str(run.folder),
        "state": state.state,
        "exit_code": state.exit_code,
        "detail": state.detail,
        "strategy": recipe.strategy.name,
        "launcher": launched.get("launcher", recipe.launcher.name) if started is None else started.name,
        "job_id": None if started is None else started.job_id,
        "ranks": recipe.launcher.nodes * recipe.launcher.nproc,
        "step": train[-1]["step"] if train else 0,
        "steps": recipe.train.steps,
        "train": train[-1] if train else None,
        "eval": evaluations[-1] if evaluations else None,
        "checkpoint": saved[-1]["step"] if saved else None,
        "checkpoints": run.checkpoints(recipe),
        "restarts": sum(event["event"] == "restart" for event in events),
    }


def counted(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _print_status(facts: dict[str, Any]) -> None:
    from ..track import lines

    state = facts["state"] + (f" (exit code {facts['exit_code']})" if facts["exit_code"] else "")
    rows = {
        "run": facts["id"],
        "state": f"{state}; {facts['detail']}" if facts["detail"] else state,
        "started": f"{facts['strategy']} on {counted(facts['ranks'], 'rank')}, by {facts['launcher']}",
        "step": f"{facts['step']}/{facts['steps']}",
    }
    if train := facts["train"]:
        until = facts["steps"] if facts["state"] == "running" else train["step"]  # no time is left to one that ended
        rows["train"] = lines.progress_line(train, until).partition("  ")[2]
    if facts["eval"]:
        rows["eval"] = lines.evaluation_line(facts["eval"]).removeprefix("eval ")
    if facts["checkpoint"] is not None:
        rows["saved"] = f"step {facts['checkpoint']}, in {facts['checkpoints']}"
    if facts["restarts"]:
        rows["restarts"] = str(facts["restarts"])
    rows["folder"] = facts["folder"]
    for name, text in rows.items():
        print(f"{name:<9} {text}")
