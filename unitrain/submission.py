"""From a run and its recipe to a job of a launcher: first as values that can be read, then started precisely so."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import registry
from .agent.local_job import STATE, start_job
from .agent.records import read_record
from .errors import UserError
from .launcher import Job, JobStatus, Launcher, Rendered
from .recipe import Recipe
from .recipe_file import check, load_recipe, to_yaml
from .run import Run
from .snapshot import Survey, settle, take


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Everything that starting takes; nothing is started."""

    run: Run
    recipe: Recipe
    code: Survey | None  # what is to be copied into the run's folder
    launcher: Launcher
    job: Job
    rendered: Rendered


def ask(
    recipe: Recipe, run_dir: Path | None, *, installed: bool = True, new_code: bool = False
) -> tuple[Recipe, Survey | None]:
    """The recipe as the run's folder is to hold it, and the code to be copied there, once nothing speaks against it.

    Creates nothing. `run_dir`: None where the folder is still to be named. Not `installed`: for looking at it only.
    `new_code`: a run that has a copy of the code gets another. Raises UserErrors.
    """
    # A strategy's class costs the import of its framework, and its ranks check again: only who looks pays for it.
    check(recipe, with_strategy=not installed, installed=installed)
    return settle(recipe, run_dir, Path.cwd(), anew=new_code)


def prepare(run: Run, recipe: Recipe, code: Survey | None) -> Submission:
    """What starting the run takes, of what `ask` has returned; the run's folder need not be there yet."""
    launcher = launcher_named(recipe.launcher.name)
    job = job_of(run, recipe)
    return Submission(run=run, recipe=recipe, code=code, launcher=launcher, job=job, rendered=launcher.render(job))


def job_of(run: Run, recipe: Recipe) -> Job:
    """The job that a recipe asks for; a controller is one process, and finds places for its ranks by itself."""
    entry = registry.known("strategies", recipe.strategy.name)
    return Job(
        run_id=run.id,
        run_dir=run.folder,
        nodes=1 if entry.inner else recipe.launcher.nodes,
        nproc=1 if entry.inner else recipe.launcher.nproc,
        recipe=to_yaml(recipe),
        options=recipe.launcher.options,
        preload=entry.preload,
        fork=entry.fork,
        recovery=recipe.recovery,
    )


def num_ranks(recipe: Recipe) -> int:
    """How many ranks a recipe asks for, whoever starts them."""
    asked = recipe.launcher.nodes * recipe.launcher.nproc
    if registry.known("strategies", recipe.strategy.name).inner:
        return int(recipe.strategy.options.get("actors") or asked)
    return asked


def launcher_named(name: str) -> Launcher:
    """The launcher, whether what it needs is installed here or not."""
    launcher: Launcher = registry.resolve(registry.known("launchers", name).path)()
    return launcher


def submit(submission: Submission) -> str:
    """Copy the code, if that was asked for, and start the job; its id. The run's folder holds the recipe by now."""
    run, recipe, job = submission.run, submission.recipe, submission.job
    facts: dict[str, Any] = {}
    if submission.code is not None:
        facts["code"] = take(submission.code, run.folder)["sha256"]
    job_id = submission.launcher.submit(job, submission.rendered)
    _say_launched(run, recipe, job_id, cwd=str(Path.cwd()), **facts)
    return job_id


def start_beside(run: Run, recipe: Recipe) -> subprocess.Popen[bytes]:
    """Start the job of a recipe of launcher `local`, away from our terminal; for commands that compare runs.

    The agent's command line is not told to go on alone: it ends when we do.
    """
    submission = prepare(run, recipe, None)
    (run.folder / "logs").mkdir(exist_ok=True)
    process = start_job(submission.job, submission.rendered, recipe.launcher.name, detached=True)
    _say_launched(run, recipe, str(process.pid))
    return process


def _say_launched(run: Run, recipe: Recipe, job_id: str, **facts: Any) -> None:
    shape = recipe.launcher
    names = {"launcher": shape.name, "job_id": job_id, "strategy": recipe.strategy.name}
    run.event("launch", **names, nodes=shape.nodes, nproc=shape.nproc, **facts)


@dataclass(frozen=True)
class Started:
    """A run's newest job, as any shell finds it."""

    run: Run
    name: str  # of its launcher
    launcher: Launcher
    job_id: str

    @classmethod
    def of(cls, run: Run) -> Started | None:
        """None where no launcher has started a job of it."""
        launched = run.launched()
        state = read_record(run.folder / STATE) or {}
        # Whoever submitted it may have died before it could say so in the events.
        submitted = state.get("submitted")
        if isinstance(submitted, int | float) and submitted > launched.get("time", 0.0):
            launched = state
        name, job_id = launched.get("launcher"), launched.get("job_id")
        if not isinstance(job_id, str):
            return None
        if not isinstance(name, str) or not name:
            name = _launcher_asked(run)
        return cls(run, name, launcher_named(name), job_id)

    def status(self) -> JobStatus:
        """What became of it."""
        return self.launcher.status(self.run.folder, self.job_id)

    def cancel(self, *, grace_seconds: float) -> None:
        """Ask it to stop, and end it when the grace is over."""
        self.launcher.cancel(self.run.folder, self.job_id, grace_seconds=grace_seconds)


def _launcher_asked(run: Run) -> str:
    return load_recipe(run.recipe_path).launcher.name


def launcher_of(run: Run) -> Launcher:
    """That of the run's newest job, or the one that its recipe names."""
    started = Started.of(run)
    return launcher_named(_launcher_asked(run)) if started is None else started.launcher


def status_of(run: Run) -> JobStatus:
    """What became of the run's newest job; `unknown` where no launcher started one."""
    started = Started.of(run)
    return JobStatus("unknown") if started is None else started.status()


def refuse_active(run: Run, name: str) -> None:
    """Raise UserError while a job of the run is pending or running; `name` is what the user calls the run."""
    if (state := status_of(run).state) in ("pending", "running"):
        raise UserError(f"{run.id} is {state}; wait for its end, or stop it with `unitrain cancel {name}`")
