"""`unitrain launch` and `unitrain resume`: from a recipe to a running job."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ExitCode, UserError
from . import complete
from .runs import counted, state_of

if TYPE_CHECKING:
    from ..launcher import Job, Launcher, Rendered
    from ..recipe import Recipe
    from ..run import Run

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values in place of the recipe's: train.steps=200.")
]
Strategy = Annotated[
    str | None,
    typer.Option(
        "--strategy", metavar="NAME", help="Train with this backend instead.", autocompletion=complete.strategies
    ),
]


def _checked_range(text: str | None) -> str | None:
    if text is not None and _range(text, "")[0] is None:
        raise typer.BadParameter(f"{text!r} is neither a number nor the fewest and the most, such as 1:4")
    return text


Ranks = Annotated[
    str | None,
    typer.Option(
        "--nproc",
        metavar="N",
        callback=_checked_range,
        help="Ranks on each node; 1:4: four, and at least one when others are lost.",
    ),
]
Nproc = Annotated[int | None, typer.Option("--nproc", metavar="N", min=1, help="Ranks on each node.")]


def launch(
    recipe_path: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A recipe file; docs/recipe.md tells its keys.")
    ],
    overrides: Overrides = None,
    strategy: Strategy = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            "--launcher", metavar="NAME", help="Start it by this launcher instead.", autocompletion=complete.launchers
        ),
    ] = None,
    nproc: Ranks = None,
    nodes: Annotated[
        str | None,
        typer.Option("--nodes", metavar="N", callback=_checked_range, help="Machines; 1:4: as few as one of four."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="The run's own folder; else runs/<name>-<time>-<short id>."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole recipe, the files and the command; start nothing.")
    ] = False,
) -> None:
    """Train what a recipe says, and follow it to its end."""
    from ..recipe_file import check, load_recipe
    from ..run import RUNS, Run, new_id

    ranks, fewest_ranks = _range(nproc, "min_nproc")
    machines, fewest_machines = _range(nodes, "min_nodes")
    changes = [*fewest_ranks, *fewest_machines, *(overrides or [])]
    recipe = load_recipe(recipe_path, changes, strategy=strategy, launcher=launcher, nproc=ranks, nodes=machines)
    if run_dir is not None:
        Run.refuse_taken(run_dir)
    check(recipe, with_strategy=dry_run)  # a strategy's class costs the import of its framework; its ranks check again
    if dry_run:
        run = Run(run_dir or RUNS / new_id(recipe.name))
        _show(recipe, run, *_prepared(run, recipe)[1:])
        return
    run = Run.create(run_dir, recipe)
    raise typer.Exit(_start(run, recipe, _near(run.folder)))


def resume(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or id.", autocompletion=complete.runs)],
    overrides: Overrides = None,
    strategy: Strategy = None,
    nproc: Ranks = None,
) -> None:
    """Go on with a run from its newest checkpoint.

    The strategy and the number of ranks may be others than before. The changed recipe becomes the run's own; the
    one before stays in the folder as recipe-<n>.yaml.
    """
    from ..recipe_file import check, load_recipe
    from ..run import Run

    run = Run.open(name)
    if (state := state_of(run).state) in ("pending", "running"):
        raise UserError(f"{run.id} is {state}; wait for its end, or stop it with `unitrain cancel {name}`")
    folder = _near(run.folder)
    _return_to(run.launched().get("cwd"))
    ranks, fewest = _range(nproc, "min_nproc")
    recipe = load_recipe(run.recipe_path, [*fewest, *(overrides or [])], strategy=strategy, nproc=ranks)
    check(recipe)
    kept = run.rewrite_recipe(recipe)
    code = _start(run, recipe, folder)
    if code == ExitCode.BAD_RECIPE and kept is not None:
        run.take_back_recipe(kept)  # or the next resume would be refused for the same change
    raise typer.Exit(code)


def _range(text: str | None, option: str) -> tuple[int | None, list[str]]:
    """`4`, or `1:4` as the most and the override that gives the launcher the fewest; None for neither."""
    found = re.fullmatch(r"(?:([1-9]\d{0,5}):)?([1-9]\d{0,5})", text or "")
    if found is None or (found[1] and int(found[1]) > int(found[2])):
        return None, []
    return int(found[2]), [f"launcher.options.{option}={found[1]}"] if found[1] else []


def _return_to(folder: str | None) -> None:
    """Relative paths in a recipe start where the run was launched."""
    if folder is None or Path(folder) == Path.cwd():
        return
    try:
        os.chdir(folder)
    except OSError as error:
        here = Path.cwd()
        print(
            f"note: {folder}, where the run began, is gone ({error.strerror}); paths start at {here}", file=sys.stderr
        )


def _prepared(run: Run, recipe: Recipe) -> tuple[Launcher, Job, Rendered]:
    """Everything that starting takes, and nothing started."""
    from .. import registry
    from ..launcher import Job

    entry = registry.entry("strategies", recipe.strategy.name)
    launcher: Launcher = registry.load("launchers", recipe.launcher.name)()
    job = Job(
        run_id=run.id,
        run_dir=run.folder,
        nodes=recipe.launcher.nodes,
        nproc=recipe.launcher.nproc,
        options=recipe.launcher.options,
        preload=entry.preload,
        fork=entry.fork,
        recovery=recipe.recovery,
    )
    return launcher, job, launcher.render(job)


def _start(run: Run, recipe: Recipe, folder: Path) -> int:
    """Start the run and follow it; its exit code. `folder` is the run's, as it is told to the user."""
    launcher, job, rendered = _prepared(run, recipe)
    ranks = counted(job.nodes * job.nproc, "rank")
    print(f"{run.id}: {recipe.strategy.name} on {ranks}, by {recipe.launcher.name}", flush=True)
    job_id = launcher.submit(job, rendered)
    run.event(
        "launch",
        launcher=recipe.launcher.name,
        job_id=job_id,
        strategy=recipe.strategy.name,
        nodes=job.nodes,
        nproc=job.nproc,
        cwd=str(Path.cwd()),
    )
    try:
        code = launcher.wait(job, job_id)
    except KeyboardInterrupt:
        print(f"no longer followed; see `unitrain status {folder}`", file=sys.stderr)
        return INTERRUPTED
    # Others have said what they had to say: the first failing rank's error stays the last thing on the screen.
    if code == ExitCode.DONE:
        print(f"done: {folder}, metrics in {folder / 'metrics.jsonl'}")
    return code


def _show(recipe: Recipe, run: Run, job: Job, rendered: Rendered) -> None:
    """The dry run: what would be read, written and started, and nothing of it is."""
    from ..recipe_file import to_yaml

    folder = _near(run.folder)
    parts: dict[str, str] = {str(folder / "recipe.yaml"): to_yaml(recipe)}
    parts |= {str(folder / path): content for path, content in rendered.files.items()}
    for path, content in parts.items():
        print(f"# file {path}\n{content.rstrip()}\n")
    ranks = counted(job.nodes * job.nproc, "rank")
    print(f"# command on {'this machine' if job.nodes == 1 else f'each of {job.nodes} nodes'}, for {ranks}")
    setting = [f"{name}={shlex.quote(value)}" for name, value in rendered.environ.items()]
    print(" ".join([*setting, shlex.join(rendered.argv)]))


def _near(path: Path) -> Path:
    """The path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
