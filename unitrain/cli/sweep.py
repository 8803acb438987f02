"""`unitrain launch --sweep`: the same recipe with every combination of some values, each a run of its own."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..errors import ExitCode, RecipeError, UserError

if TYPE_CHECKING:
    from ..launcher import Job, Rendered
    from ..recipe import Recipe
    from ..submission import Submission

_MOST_RUNS = 1000
_OPEN, _CLOSE = "[{(", ")}]"


@runtime_checkable
class Arrays(Protocol):
    """A launcher that starts many runs by one job. `folder` is the sweep's own, beside those of the runs."""

    def render_array(self, jobs: Sequence[Job], folder: Path) -> Rendered:
        """The files, named from `folder`, and the command line. Pure."""

    def submit_array(self, jobs: Sequence[Job], folder: Path, rendered: Rendered) -> list[str]:
        """Write the files, start the command, return the id of each run's job."""


def combinations(sweeps: Sequence[str]) -> list[list[str]]:
    """Each combination of `key=a,b,c` as overrides; the last key changes fastest. Raises RecipeError."""
    axes = []
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = _values(text)
        if not key or not equals or not all(values):
            raise RecipeError(f"--sweep {sweep!r} is not key=value,value, such as optimizer.lr=1e-4,3e-4")
        axes.append([f"{key}={value}" for value in values])
    keys = [sweep.partition("=")[0] for sweep in sweeps]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise RecipeError(f"--sweep {twice} is given twice; give all of its values once, with commas")
    if own := next((key for key in keys if key.split(".")[0] == "launcher"), None):
        raise RecipeError(f"--sweep {own}: all runs of a sweep ask for the same machines; sweep over another key")
    points = [list(point) for point in itertools.product(*axes)]
    if len(points) > _MOST_RUNS:
        raise RecipeError(f"--sweep makes {len(points)} runs; at most {_MOST_RUNS} are one sweep")
    return points


def _values(text: str) -> list[str]:
    """The values between commas; a comma inside brackets or quotes is a value's own."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in _OPEN:
            depth += 1
        elif letter in _CLOSE:
            depth -= 1
        elif letter == "," and depth == 0:
            values.append("")
            continue
        values[-1] += letter
    return [value.strip() for value in values]


def launch_all(
    recipes: Sequence[Recipe],
    points: Sequence[Sequence[str]],
    folder: Path,
    *,
    dry_run: bool,
    detach: bool,
    as_json: bool,
) -> int:
    """Start a run for each recipe, `<folder>-<n>`: all by one job where the launcher can, else one after the other.

    The exit code of the first that failed, else 0; one job is not waited for.
    """
    from ..run import Run
    from ..submission import ask, prepare

    if folder.exists():
        raise UserError(f"{folder} is there already; name another folder for the sweep")
    runs = [Run(folder.with_name(f"{folder.name}-{number}")) for number in range(len(recipes))]
    for run in runs:
        Run.refuse_taken(run.folder)
    asked = [ask(recipe, run.folder, installed=not dry_run) for run, recipe in zip(runs, recipes, strict=True)]
    submissions = [prepare(run, recipe, code) for run, (recipe, code) in zip(runs, asked, strict=True)]
    launcher = submissions[0].launcher
    if isinstance(launcher, Arrays):
        return _at_once(launcher, submissions, points, folder, dry_run=dry_run, as_json=as_json)
    if detach or as_json:
        name = recipes[0].launcher.name
        raise UserError(f"with launcher {name!r} the runs of a sweep take turns: leave out --detach and --json")
    return _in_turn(submissions, points, dry_run=dry_run)


def _at_once(
    launcher: Arrays,
    submissions: Sequence[Submission],
    points: Sequence[Sequence[str]],
    folder: Path,
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    from ..run import Run
    from ..snapshot import take

    jobs = [submission.job for submission in submissions]
    rendered = launcher.render_array(jobs, folder.absolute())
    if dry_run:
        _show_array(submissions, points, folder, rendered, as_json=as_json)
        return ExitCode.DONE
    codes = []
    for submission in submissions:
        run = Run.create(submission.run.folder, submission.recipe)
        codes.append(None if submission.code is None else take(submission.code, run.folder)["sha256"])
    ids = launcher.submit_array(jobs, folder.absolute(), rendered)
    for submission, job_id, code in zip(submissions, ids, codes, strict=True):
        submission.run.event(
            "launch",
            launcher=submission.recipe.launcher.name,
            job_id=job_id,
            strategy=submission.recipe.strategy.name,
            nodes=submission.job.nodes,
            nproc=submission.job.nproc,
            cwd=str(Path.cwd()),
            **({} if code is None else {"code": code}),
        )
    _report(submissions, points, ids, as_json=as_json)
    return ExitCode.DONE


def _in_turn(submissions: Sequence[Submission], points: Sequence[Sequence[str]], *, dry_run: bool) -> int:
    from ..run import Run
    from .launch import INTERRUPTED, near, show, start

    codes = []
    for submission, point in zip(submissions, points, strict=True):
        print(f"# {' '.join(point)}", flush=True)
        if dry_run:
            show(submission, as_json=False)
            continue
        Run.create(submission.run.folder, submission.recipe)
        codes.append(start(submission, near(submission.run.folder), detach=False, as_json=False))
        if codes[-1] == INTERRUPTED:
            break
    return next((code for code in codes if code), ExitCode.DONE)


def _report(
    submissions: Sequence[Submission], points: Sequence[Sequence[str]], ids: Sequence[str], *, as_json: bool
) -> None:
    """Which run has which values, and which job it is."""
    from .launch import near
    from .listing import print_json, print_table

    if as_json:
        print_json([
            {"id": one.run.id, "folder": str(one.run.folder), "job_id": job_id, "values": list(point)}
            for one, job_id, point in zip(submissions, ids, points, strict=True)
        ])  # fmt: skip
        return
    rows = [
        [str(near(one.run.folder)), job_id, " ".join(point)]
        for one, job_id, point in zip(submissions, ids, points, strict=True)
    ]
    print_table(["run", "job", "values"], rows)


def _show_array(
    submissions: Sequence[Submission],
    points: Sequence[Sequence[str]],
    folder: Path,
    rendered: Rendered,
    *,
    as_json: bool,
) -> None:
    """The dry run of an array: every file, and the one command."""
    from ..recipe_file import to_yaml
    from .launch import near
    from .listing import print_json

    files = {str(one.run.folder / "recipe.yaml"): to_yaml(one.recipe) for one in submissions}
    files |= {os.path.normpath(folder.absolute() / path): content for path, content in rendered.files.items()}
    if as_json:
        values = {one.run.id: list(point) for one, point in zip(submissions, points, strict=True)}
        print_json({"values": values, "files": files, "environ": dict(rendered.environ), "argv": list(rendered.argv)})
        return
    for path, content in files.items():
        print(f"# file {near(Path(path))}\n{content.rstrip()}\n")
    print(f"# command for {len(submissions)} runs\n{shlex.join(rendered.argv)}")
