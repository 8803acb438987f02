"""`unitrain launch` and `unitrain resume`: from a recipe to a running job."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ExitCode
from . import complete
from .listing import print_json
from .runs import counted

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..run import Run
    from ..submission import Submission

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
Machines = Annotated[
    str | None,
    typer.Option("--nodes", metavar="N", callback=_checked_range, help="Machines; 1:4: as few as one of four."),
]
Launcher = Annotated[
    str | None,
    typer.Option(
        "--launcher", metavar="NAME", help="Start it by this launcher instead.", autocompletion=complete.launchers
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the whole recipe, the files and the command; start nothing.")
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Return once it is submitted, and print the name by which it is found again.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


def launch(
    recipe_path: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A recipe file; docs/recipe.md tells its keys.")
    ],
    overrides: Overrides = None,
    strategy: Strategy = None,
    launcher: Launcher = None,
    nproc: Ranks = None,
    nodes: Machines = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="The run's own folder; else runs/<name>-<time>-<short id>."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY=A,B", help="A run for each value; given again: for each combination."),
    ] = None,
    dry_run: DryRun = False,
    detach: Detach = False,
    as_json: AsJson = False,
) -> None:
    """Train what a recipe says, and follow it to its end."""
    from ..recipe_file import load_recipe
    from ..run import RUNS, Run, new_id
    from ..submission import ask, prepare

    _refuse_json(as_json, dry_run or detach or bool(sweep))
    ranks, fewest_ranks = _range(nproc, "min_nproc")
    machines, fewest_machines = _range(nodes, "min_nodes")
    changes = [*fewest_ranks, *fewest_machines, *(overrides or [])]

    def load(*point: str) -> Recipe:
        asked = [*changes, *point]
        return load_recipe(recipe_path, asked, strategy=strategy, launcher=launcher, nproc=ranks, nodes=machines)

    recipe = load()
    if sweep:
        from .sweep import combinations, launch_all

        points = combinations(sweep)
        folder = run_dir or RUNS / new_id(recipe.name)
        recipes = [load(*point) for point in points]
        raise typer.Exit(launch_all(recipes, points, folder, dry_run=dry_run, detach=detach, as_json=as_json))
    if detach:
        recipe = _detached(recipe)
    if run_dir is not None:
        Run.refuse_taken(run_dir)
    recipe, code = ask(recipe, run_dir, installed=not dry_run)
    if dry_run:
        show(prepare(Run(run_dir or RUNS / new_id(recipe.name)), recipe, code), as_json=as_json)
        return
    run = Run.create(run_dir, recipe)
    raise typer.Exit(start(prepare(run, recipe, code), near(run.folder), detach=detach, as_json=as_json))


def resume(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or id.", autocompletion=complete.runs)],
    overrides: Overrides = None,
    strategy: Strategy = None,
    launcher: Launcher = None,
    nproc: Ranks = None,
    nodes: Machines = None,
    new_code: Annotated[
        bool, typer.Option("--new-code", help="With code.snapshot: copy the project as it is now.")
    ] = False,
    dry_run: DryRun = False,
    detach: Detach = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run from its newest checkpoint.

    The strategy, the launcher and the number of ranks may be others than before. The changed recipe becomes the run's
    own; the one before stays in the folder as recipe-<n>.yaml.
    """
    from ..recipe_file import load_recipe
    from ..run import Run
    from ..submission import ask, prepare, refuse_active

    _refuse_json(as_json, dry_run or detach)
    run = Run.open(name)
    refuse_active(run, name)
    folder = near(run.folder)
    _return_to(run.launched().get("cwd"))
    ranks, fewest_ranks = _range(nproc, "min_nproc")
    machines, fewest_machines = _range(nodes, "min_nodes")
    changes = [*fewest_ranks, *fewest_machines, *(overrides or [])]
    recipe = load_recipe(run.recipe_path, changes, strategy=strategy, launcher=launcher, nproc=ranks, nodes=machines)
    if detach:
        recipe = _detached(recipe)
    recipe, code = ask(recipe, run.folder, installed=not dry_run, new_code=new_code)
    if dry_run:
        show(prepare(run, recipe, code), as_json=as_json)
        return
    kept = run.rewrite_recipe(recipe)
    code_of_run = start(prepare(run, recipe, code), folder, detach=detach, as_json=as_json)
    if code_of_run == ExitCode.BAD_RECIPE and kept is not None:
        run.take_back_recipe(kept)  # or the next resume would be refused for the same change
    raise typer.Exit(code_of_run)


def _refuse_json(as_json: bool, quiet: bool) -> None:
    if as_json and not quiet:
        raise typer.BadParameter("--json goes with --dry-run or --detach; else the run's own lines are printed")


def _detached(recipe: Recipe) -> Recipe:
    """The recipe whose job outlives this process."""
    from .. import registry

    if not registry.known("launchers", recipe.launcher.name).child:
        return recipe
    options = {**recipe.launcher.options, "detached": True}
    return recipe.replace(launcher=dataclasses.replace(recipe.launcher, options=options))


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


def start(submission: Submission, folder: Path, *, detach: bool, as_json: bool) -> int:
    """Start the run and follow it; its exit code. `folder` is the run's, as it is told to the user."""
    from ..submission import num_ranks, submit

    run, recipe, job = submission.run, submission.recipe, submission.job
    ranks = counted(num_ranks(recipe), "rank")
    # Scripts read the name from stdout: `id=$(unitrain launch --detach ...)`.
    where = sys.stderr if detach else sys.stdout
    print(f"{run.id}: {recipe.strategy.name} on {ranks}, by {recipe.launcher.name}", file=where, flush=True)
    if submission.code is not None:
        print(f"code: {submission.code}", file=where, flush=True)
    job_id = submit(submission)
    if detach:
        name = _name(run)
        if as_json:
            print_json({"id": run.id, "folder": str(run.folder), "launcher": recipe.launcher.name, "job_id": job_id})
        else:
            print(name)
        print(f"job {job_id}; see `unitrain status {name}`", file=where)
        return ExitCode.DONE
    try:
        code = submission.launcher.wait(job, job_id)
    except KeyboardInterrupt:
        print(f"no longer followed; see `unitrain status {folder}`", file=sys.stderr)
        return INTERRUPTED
    # Others have said what they had to say: the first failing rank's error stays the last thing on the screen.
    if code == ExitCode.DONE:
        print(f"done: {folder}, metrics in {folder / 'metrics.jsonl'}")
    return code


def _name(run: Run) -> str:
    """What finds the run from here: its id, or its folder where that is not in ./runs."""
    from ..run import RUNS

    return run.id if run.folder.parent == RUNS.absolute() else str(run.folder)


def show(submission: Submission, *, as_json: bool) -> None:
    """The dry run: what would be read, written and started, and nothing of it is."""
    from ..recipe_file import to_dict, to_yaml

    run, recipe, job, rendered = submission.run, submission.recipe, submission.job, submission.rendered
    if as_json:
        code = submission.code
        print_json({
            "id": run.id,
            "folder": str(run.folder),
            "launcher": recipe.launcher.name,
            "nodes": job.nodes,
            "nproc": job.nproc,
            "recipe": to_dict(recipe),
            "code": None if code is None else [file.path for file in code.files],
            "files": {str(run.folder / path): content for path, content in rendered.files.items()},
            "environ": dict(rendered.environ),
            "argv": list(rendered.argv),
        })  # fmt: skip
        return
    folder = near(run.folder)
    parts: dict[str, str] = {str(folder / "recipe.yaml"): to_yaml(recipe)}
    parts |= {str(folder / path): content for path, content in rendered.files.items()}
    for path, content in parts.items():
        print(f"# file {path}\n{content.rstrip()}\n")
    if submission.code is not None:
        print(f"# folder {folder / 'code'}: {submission.code}")
        for file in submission.code.files:
            print(file.path)
        print()
    ranks = counted(job.nodes * job.nproc, "rank")
    print(f"# command on {'this machine' if job.nodes == 1 else f'each of {job.nodes} nodes'}, for {ranks}")
    setting = [f"{name}={shlex.quote(value)}" for name, value in rendered.environ.items()]
    print(" ".join([*setting, shlex.join(rendered.argv)]))


def near(path: Path) -> Path:
    """The path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
