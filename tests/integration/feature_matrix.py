"""Every feature on every strategy: what the ranks of test_feature_matrix.py do, and the data that they train on.

The features are in features.py; the models and losses of a framework in a module of its own (features_torch.py).
"""

from __future__ import annotations

import importlib
import json
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from features import FEATURES, FRAMEWORKS, REFUSED, runnable
from forked import Shape
from runs import copied

import unitrain
from unitrain import registry
from unitrain.cursor import sample_ids
from unitrain.errors import UserError
from unitrain.recipe_file import recipe_from_text
from unitrain.world import World

STEPS, SAVED = 6, 3  # of a run, and of the checkpoint that is resumed
SEQ_LEN, NUM_TOKENS = 12, 64
RECIPE = f"""\
trainer: feature_matrix:none
optimizer: {{lr: 1e-2, betas: [0.8, 0.95], weight_decay: 0.1, clip: 0.5}}
train: {{steps: {STEPS}, global_batch: 7, micro_batch: 2, log_every: 1, eval_every: {SAVED}}}
checkpoint: {{every: {SAVED}, async: false}}
strategy: {{name: STRATEGY}}
"""
NUM_ROWS = {"train": 45, "eval": 22}  # odd: the last batch of an evaluation holds a single row
NONE_WEIGHS = 3  # the step of `weightless_rows` in which no row weighs anything


def part(folder: Path, act: str, shape: Shape) -> dict[str, Any]:
    """One rank's part: all runs of a shape, `folder / act / shape / run`, until one fails; what happened in each."""
    found: dict[str, Any] = {}
    for name, feature, overrides in runs_of(shape.strategy):
        began = time.monotonic()
        try:
            found[name] = _run(folder / act / str(shape) / name, feature, shape.strategy, overrides)
        except Exception:
            # The other ranks now wait for this one: no further run can tell anything.
            found[name] = {"failed": traceback.format_exc()}
            traceback.print_exc()
            break
        found[name]["seconds"] = round(time.monotonic() - began, 2)
    return found


def runs_of(strategy: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(run, feature, overrides): every feature, and again with what its refusal tells to set."""
    for name, feature in runnable().items():
        yield name, name, feature.recipe
        refusal = REFUSED.get((name, strategy))
        if refusal and refusal.options:
            yield f"{name}-as-told", name, (*feature.recipe, *refusal.options)


def _run(folder: Path, feature: str, strategy: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Train, then resume a copy of the run from its middle; or how it was refused."""
    world = World.from_environment()
    recipe = recipe_from_text(RECIPE.replace("STRATEGY", strategy), overrides=overrides)
    module = importlib.import_module(FRAMEWORKS[registry.entry("strategies", strategy).framework])
    kind: type[Featured] = getattr(module, FEATURES[feature].trainer)
    trainer = kind(recipe, run_dir=folder, world=world)
    try:
        trainer.fit()
    except UserError as error:
        return {"refused": str(error), "kind": type(error).__name__, "step": trainer.cursor.step}
    again = folder.with_name(f"{folder.name}-again")
    if world.first:
        copied(folder, again, up_to=SAVED)
    kind(recipe, run_dir=again, world=world).fit()
    return {}


class Featured(unitrain.Trainer):
    """Rows whose weights run from 0 to 16, so that a mean of means is far from the mean."""

    def build_source(self, split: str) -> unitrain.Source | None:
        """See Trainer."""
        return unitrain.ArraySource(**self.arrays(split))

    def arrays(self, split: str) -> dict[str, np.ndarray[Any, Any]]:
        """x (rows, 6), y (rows, 1), weight (rows,), all float32, and number (rows,), int64: the sample's id."""
        draws = np.random.default_rng({"train": 0, "eval": 1}[split])
        rows = NUM_ROWS[split]
        x = draws.standard_normal((rows, 6)).astype(np.float32)
        y = np.tanh(x[:, :1] * x[:, 1:2]) + 0.1 * draws.standard_normal((rows, 1))
        weight = draws.integers(0, 5, rows) ** 2
        return {
            "x": x,
            "y": y.astype(np.float32),
            "weight": weight.astype(np.float32),
            "number": np.arange(rows),
        }

    def note(self, **facts: Any) -> None:
        """Write facts (JSON) into noted.json of the run's folder."""
        assert self.run is not None, "the run has started"
        if self.world.first:
            (self.run.folder / "noted.json").write_text(json.dumps(facts))


class WeightlessRows(Featured):
    """Most rows weigh nothing, those of one step none."""

    def arrays(self, split: str) -> dict[str, np.ndarray[Any, Any]]:
        """See Featured."""
        arrays = super().arrays(split)
        train, rows = self.recipe.train, NUM_ROWS["train"]
        if split == "train":
            arrays["weight"][::3] = 0
            arrays["weight"][sample_ids(train.seed, NONE_WEIGHS, train.global_batch, rows)] = 0
        return arrays


class RareRows(Featured):
    """Adds `part` (rows,), int64: 1 in no row of the first batch and in one of each other, so that one rank has it."""

    def arrays(self, split: str) -> dict[str, np.ndarray[Any, Any]]:
        """See Featured."""
        arrays = super().arrays(split)
        arrays["part"] = np.zeros(NUM_ROWS[split], dtype=np.int64)
        train = self.recipe.train
        if split == "train":
            for step, row in self.rows().items():
                arrays["part"][sample_ids(train.seed, step, train.global_batch, NUM_ROWS[split])[row]] = 1
        return arrays

    def rows(self) -> Mapping[int, int]:
        """Step -> the row of its batch that has part 1."""
        return {1: 5, 2: 3, 3: 6, 4: 1, 5: 2}


class EvenRows(Featured):
    """x (rows, 4, 6): the same four vectors in every row, in another order, so that means over any rows are equal."""

    def arrays(self, split: str) -> dict[str, np.ndarray[Any, Any]]:
        """See Featured."""
        arrays = super().arrays(split)
        draws = np.random.default_rng(2)
        vectors = draws.standard_normal((4, 6)).astype(np.float32)
        arrays["x"] = np.stack([vectors[draws.permutation(4)] for _ in range(NUM_ROWS[split])])
        return arrays


class TokenRows(Featured):
    """tokens and targets (rows, 12), int64."""

    def arrays(self, split: str) -> dict[str, np.ndarray[Any, Any]]:
        """See Featured."""
        draws = np.random.default_rng({"train": 3, "eval": 4}[split])
        text = draws.integers(0, NUM_TOKENS, (NUM_ROWS[split], SEQ_LEN + 1)) // 2
        return {"tokens": text[:, :-1].copy(), "targets": text[:, 1:].copy()}
