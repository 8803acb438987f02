"""One run of a verification: started by our own agent, and what its folder says when it has ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..agent.local_job import wait_for
from ..agent.records import EXIT, read_record
from ..checkpoint import newest
from ..errors import ExitCode, UnitrainError
from ..run import Run
from ..submission import start_beside
from .plan import Trial


class Interrupted(Exception):
    """A signal asked to stop; the run's processes have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number  # as shells have it


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run gave. With an `error` the rest may be incomplete."""

    trial: Trial
    folder: Path
    losses: list[float | None]  # of step 1, 2, ...; None: not finite
    seconds: float | None  # of training: from the first step to the last
    memory_bytes: int | None  # the most that rank 0 held
    checkpoint: str  # folder
    error: str = ""  # one line


def run_trial(trial: Trial, root: Path) -> Outcome:
    """Train in `root`/<strategy>, where everything that the ranks print lies too. Raises Interrupted."""
    run = Run.create(root / trial.folder, trial.recipe)
    process = start_beside(run, trial.recipe)
    code, caught = wait_for(process)
    if caught is not None:
        raise Interrupted(caught)
    return _outcome(trial, run, code)


def _outcome(trial: Trial, run: Run, code: int) -> Outcome:
    metrics = [record for record in run.metrics() if record["split"] == "train"]
    found: dict[str, Any] = {
        "trial": trial,
        "folder": run.folder,
        "losses": [record["loss"] for record in metrics],
        "seconds": metrics[-1]["seconds"] if metrics else None,
        "memory_bytes": max((record["memory_bytes"] for record in metrics), default=None),
    }
    if code != ExitCode.DONE:
        ended = read_record(run.folder / EXIT) or {}
        return Outcome(
            **found, checkpoint="", error=_first_line(ended.get("error") or f"it ended with exit code {code}")
        )
    steps = [record["step"] for record in metrics]
    if steps != list(range(1, trial.recipe.train.steps + 1)):
        return Outcome(**found, checkpoint="", error=f"{len(steps)} of {trial.recipe.train.steps} steps were logged")
    try:
        saved = newest(run.checkpoints(trial.recipe))
    except UnitrainError as error:
        return Outcome(**found, checkpoint="", error=_first_line(str(error)))
    if saved is None or saved.step != trial.recipe.train.steps:
        return Outcome(**found, checkpoint="", error="it left no checkpoint of its last step")
    return Outcome(**found, checkpoint=saved.folder)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "it said nothing"
