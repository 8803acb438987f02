"""Trainers whose training goes wrong, each in its own way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unitrain
from unitrain.cursor import sample_ids

sys.path.insert(0, str(Path(__file__).parent))  # this file is loaded by its path

from trainers import Slow, Witness


class Poisoned(Slow):
    """Rows whose targets are far off, wherever the seed puts these samples."""

    bad = tuple(sample_ids(0, 17, 10, 203)[:3].tolist())  # in step 18

    def build_source(self, split: str) -> unitrain.Source:
        """The rows of Rows, with some poisoned."""
        whole = super().build_source(split)
        arrays: dict[str, Any] = dict(whole.fetch(np.arange(len(whole))))
        if split == "train":
            arrays["y"] = arrays["y"].copy()
            arrays["y"][list(self.bad)] = 1e4
            arrays["weight"] = np.ones_like(arrays["weight"])
        return unitrain.ArraySource(**arrays)


class Interrupted(Poisoned):
    """Asked to stop in the very step that spikes, where the run's folder says so."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """One update."""
        assert self.run is not None, "the run has started"
        order = self.run.folder / "signal"
        if self.cursor.step == 17 and order.exists():
            order.unlink()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(batch)


class Hopeless(Poisoned):
    """The same from step 18 to step 20."""

    bad = tuple(sample_ids(0, 17, 10, 203).tolist() + sample_ids(0, 18, 10, 203).tolist())


class Lost(Witness):
    """The gradients of steps 5 and 8 are not finite."""

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> unitrain.Loss:
        """See Rows."""
        found = super().loss(model, batch)
        return found._replace(sum=found.sum * float("nan")) if self.cursor.step in (4, 7) else found


class NotFinite(Witness):
    """From the twelfth step on."""

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> unitrain.Loss:
        """A mistake that depends on the step alone."""
        found = super().loss(model, batch)
        return found._replace(sum=found.sum * float("nan")) if self.cursor.step >= 11 else found


class Flipped(Slow):
    """Rank 1 holds another weight after step 12, once."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """One update, then the flip."""
        assert self.run is not None, "the run has started"
        out = super().step(batch)
        marker = self.run.folder / "flipped"
        if self.cursor.step == 11 and self.world.rank == 1 and not marker.exists():
            marker.touch()
            with torch.no_grad():
                self.engines["model"].model[2].weight[0, 3] += 1e-3
        return out


class Allergic(Slow):
    """Raises on one sample."""

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> unitrain.Loss:
        """See Rows."""
        if 17 in batch["number"].tolist() and model.training:
            raise ArithmeticError("cannot bear sample 17")
        return super().loss(model, batch)
