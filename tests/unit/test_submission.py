"""From a run to a job and back: which job a run's folder tells of, and what a job is made of."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from unitrain.agent.local_job import STATE
from unitrain.errors import MissingExtra, UserError
from unitrain.recipe import LauncherRecipe, Recipe, RecoveryRecipe, StrategyRecipe
from unitrain.registry import Entry
from unitrain.run import Run
from unitrain.submission import Started, ask, job_of, launcher_of, status_of

pytestmark = pytest.mark.fast

RECIPE = Recipe(
    trainer="a:B",
    strategy=StrategyRecipe(name="ddp"),
    launcher=LauncherRecipe(name="local", nproc=3, options={"grace_seconds": 5}),
    recovery=RecoveryRecipe(restarts=7),
)


def test_a_job_is_what_the_recipe_asks_for(tmp_path: Path) -> None:
    job = job_of(Run(tmp_path / "x"), RECIPE)
    assert (job.run_id, job.run_dir, job.nodes, job.nproc) == ("x", tmp_path / "x", 1, 3)
    assert (job.options, job.recovery.restarts, job.preload[0], job.fork) == ({"grace_seconds": 5}, 7, "torch", True)


def test_the_newest_job_is_found_whoever_could_still_write_it_down(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", RECIPE)
    assert Started.of(run) is None
    assert status_of(run).state == "unknown"
    assert launcher_of(run).name == "local"

    run.event("launch", launcher="torchrun", job_id="11")
    found = Started.of(run)
    assert found is not None and (found.name, found.job_id) == ("torchrun", "11")

    # of a launch whose command died between starting the job and saying so
    (run.folder / STATE).write_text(json.dumps({"launcher": "slurm", "job_id": "12", "submitted": time.time() + 1}))
    found = Started.of(run)
    assert found is not None and (found.name, found.job_id) == ("slurm", "12")

    # of a job before this one, by a launcher that leaves a file
    (run.folder / STATE).write_text(json.dumps({"launcher": "slurm", "job_id": "10", "submitted": time.time() - 60}))
    found = Started.of(run)
    assert found is not None and (found.name, found.job_id) == ("torchrun", "11")


def test_what_is_not_installed_matters_where_ranks_run_here_and_not_for_looking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Entry, "installed", property(lambda entry: not entry.requires))
    asked = RECIPE.replace(trainer="unitrain.tasks:Classification", strategy=StrategyRecipe(name="zero2"))
    with pytest.raises(MissingExtra, match="DeepSpeed"):
        ask(asked, tmp_path)
    assert ask(asked, tmp_path, installed=False) == (asked, None)
    options = {"image": "registry.local/unitrain:1", "volume": {"claim": "runs"}}
    there = asked.replace(launcher=LauncherRecipe(name="kubernetes", nproc=2, options=options))
    with pytest.raises(MissingExtra, match="kubernetes client"):
        ask(there, tmp_path)
    monkeypatch.setattr(Entry, "installed", property(lambda entry: entry.requires in ("", "kubernetes")))
    assert ask(there, tmp_path) == (there, None), "the image has what the strategy needs"
    with pytest.raises(UserError, match="no launcher named 'slrm', did you mean 'slurm'"):
        ask(asked.replace(launcher=LauncherRecipe(name="slrm")), tmp_path)
