"""A visit of the doctor: a small job by any launcher whose ranks look at their nodes, and what they have found."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..agent.logs import find_log, last_lines
from ..errors import UnitrainError, UserError
from ..launcher import JobStatus
from ..recipe import CheckpointRecipe, LauncherRecipe, Recipe, RecoveryRecipe, TrainRecipe
from ..registry import known
from ..run import Run
from ..submission import Started, ask, prepare, submit
from .finding import Finding, failed
from .node import ENTRY, read_report

FEWEST_RANKS = 2  # for an all-reduce that is one
GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.2
_LAST_LINES = 3


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What was found, and where the job's own files are."""

    findings: list[Finding]
    run: Run


def visit(recipe: Recipe, run_dir: Path | None, *, patience_seconds: float, say: Callable[[str], None]) -> Visit:
    """Run the checks where the recipe's launcher puts its ranks. Raises UserErrors; Ctrl-C ends the job.

    `say` hears of what takes time.
    """
    recipe, code = ask(recipe, run_dir)
    run = Run.create(run_dir, recipe)
    try:
        submit(prepare(run, recipe, code))
    except UnitrainError as error:
        return Visit(
            findings=[failed("job", str(error), "have the launcher start it first; all else comes after")], run=run
        )
    started = Started.of(run)
    assert started is not None, "it was submitted just now"
    try:
        status = _ended(started, patience_seconds, say)
    finally:
        if started.status().state in ("pending", "running"):
            started.cancel(grace_seconds=GRACE_SECONDS)
    findings = read_report(run.folder, lambda: started.launcher.logs(run.folder, rank=0))
    if status.state != "done" or not findings:
        findings.append(_job_failed(run, status, patience_seconds))
    return Visit(findings=findings, run=run)


def recipe_for(launcher: LauncherRecipe) -> Recipe:
    """The doctor's own job on the nodes of a launcher. Raises UserError for one that runs no agent of ours."""
    if known("launchers", launcher.name).starter != "agent":
        raise UserError(f"launcher {launcher.name!r} starts an agent that is not ours; use --launcher local or ssh")
    nproc = launcher.nproc if launcher.nodes > 1 else max(launcher.nproc, FEWEST_RANKS)
    options = {**launcher.options, "entry": ENTRY}
    if known("launchers", launcher.name).child:
        options["detached"] = True  # or its output would be ours
    return Recipe(
        name="doctor",
        trainer="unitrain.doctor:none",  # the entry runs in its place
        train=TrainRecipe(global_batch=launcher.nodes * nproc),  # no fewer samples than ranks
        launcher=LauncherRecipe(name=launcher.name, nodes=launcher.nodes, nproc=nproc, options=options),
        recovery=RecoveryRecipe(restarts=0),
        checkpoint=CheckpointRecipe(every=None),
    )


def _ended(started: Started, patience_seconds: float, say: Callable[[str], None]) -> JobStatus:
    """How the job is when it has ended, or the patience has."""
    deadline, before = time.monotonic() + patience_seconds, ""
    while True:
        status = started.status()
        if status.state not in ("pending", "running", "unknown") or time.monotonic() > deadline:
            return status
        if status.state != before:
            before = status.state
            say(f"job {started.job_id} is {status.state}{f': {status.detail}' if status.detail else ''}")
        time.sleep(_POLL_SECONDS)


def _job_failed(run: Run, status: JobStatus, patience_seconds: float) -> Finding:
    log = find_log(run.folder, 0)
    said = " / ".join(last_lines(log, _LAST_LINES)) if log is not None else ""
    words = [status.detail or said or "it left no word"]
    if status.state in ("pending", "running", "unknown"):
        words.insert(0, f"still {status.state} after {patience_seconds:.0f} s")
    fix = f"look into {run.folder}; nodes that do not come must reach the first one and see that folder; or --timeout"
    return failed("job", "; ".join(words), fix)


def remove(run: Run) -> None:
    """The job's folder is of no use once all is well."""
    try:
        shutil.rmtree(run.folder)
    except OSError as error:
        raise UnitrainError(f"{run.folder} cannot be removed: {error.strerror}") from error
