"""Ranks that train one tiny model of transformers after the other, and what their Trainers leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from runs import TIMEOUT_SECONDS

from unitrain import registry
from unitrain.models.gpt_torch import logits_of
from unitrain.recipe_file import load_recipe
from unitrain.tasks import LanguageModel, MaskedLanguageModel, SequenceClassification
from unitrain.trainer_path import resolve_trainer
from unitrain.world import World

PROBE = [[5, 7, 11, 13, 6, 9, 8, 10], [12, 5, 5, 6, 7, 30, 31, 9]]  # tokens, none of them padding


def probe(model: torch.nn.Module) -> list[Any]:
    """Logits of fixed tokens."""
    tokens = torch.tensor(PROBE, device=next(model.parameters()).device)
    logits: list[Any] = logits_of(model(tokens)).tolist()
    return logits


class Told:
    """Writes down, when a run has ended, what the model says and a digest of each parameter, before and after."""

    def on(self, event: str, **facts: Any) -> None:
        """Digests of the first moment."""
        if event == "start":
            self.began = self.engines["model"].digest()

    def finish(self) -> None:
        """told.json in the run's folder."""
        engine = self.engines["model"]
        told = {"logits": engine.call(probe), "began": self.began, "ended": engine.digest()}
        if self.world.first:
            (self.run.folder / "told.json").write_text(json.dumps(told))


class Language(Told, LanguageModel):
    """See Told."""


class Masked(Told, MaskedLanguageModel):
    """See Told."""


class Classes(Told, SequenceClassification):
    """See Told."""


def train_all(folder: Path, recipes: Mapping[str, str], strategy: str, ranks: int) -> None:
    """Train every recipe, by one start of processes; each run's folder is `folder / name`."""
    folder.mkdir()
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    job = {
        "run_id": folder.name,
        "launcher": "local",
        "nodes": 1,
        "nproc": ranks,
        "preload": [*registry.entry("strategies", strategy).preload, "transformers"],
        "fork": True,
        "options": {"entry": "hf_ranks:main"},
    }
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "strategy").write_text(strategy)
    environ = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "unitrain.agent", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, **environ, "PYTHONPATH": str(Path(__file__).parent)},
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def main(arguments: list[str]) -> int:
    """One rank's part."""
    folder = Path(arguments[0])
    world = World.from_environment()
    if world.size > 1:
        # One group for all runs: each Trainer uses it as it is.
        dist.init_process_group(
            "gloo", init_method=f"tcp://{world.coordinator}", rank=world.rank, world_size=world.size
        )
    for path in sorted(folder.glob("*.yaml")):
        recipe = load_recipe(path, strategy=(folder / "strategy").read_text())
        resolve_trainer(recipe.trainer)(recipe, run_dir=folder / path.stem, world=world).fit()
    if world.size > 1:
        dist.destroy_process_group()
    return 0
