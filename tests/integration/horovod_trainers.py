"""Trainers that show what only an all-reduce of one's own can get wrong."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import unitrain


class Rare(unitrain.Trainer):
    """One part of the model sees a sample in 16, so that often one rank alone or none uses it; one part sees none."""

    seconds = 0.0  # of sleep in each step

    def build_model(self) -> nn.Module:
        """A base, and the two parts."""
        base = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 1))
        return nn.ModuleDict({"base": base, "rare": nn.Linear(6, 1), "never": nn.Linear(6, 1)})

    def build_source(self, split: str) -> unitrain.Source:
        """x (rows, 6), y (rows, 1), weight (rows,), all float32, and number (rows,), int64: the sample's id."""
        draws = np.random.default_rng({"train": 0, "eval": 1}[split])
        x = draws.standard_normal((203, 6)).astype(np.float32)
        weight = draws.integers(1, 5, 203).astype(np.float32) ** 2
        return unitrain.ArraySource(x=x, y=np.tanh(x[:, :1] * x[:, 1:2]), weight=weight, number=np.arange(203))

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> unitrain.Loss:
        """Sum of weighted squares."""
        found = model["base"](batch["x"])
        chosen = batch["number"] % 16 == 0
        if chosen.any():
            found = found + chosen[:, None] * model["rare"](batch["x"])
        errors = (found - batch["y"]).square().sum(dim=1)
        return unitrain.Loss((errors * batch["weight"]).sum(), batch["weight"].sum())

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """A pause, then the update."""
        time.sleep(self.seconds)
        return super().step(batch)


class Slow(Rare):
    """Slow enough to be killed."""

    seconds = 0.01


class Failing(Rare):
    """Rank 1 fails in its third step, while the others wait for it."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """An error in the user's own code."""
        if self.world.rank == 1 and batch.step == 2:
            raise ValueError("rank one has had enough")
        return super().step(batch)


class Heavy(Rare):
    """A weight so large that the sum of gradients is no fp16 number, although their mean is."""

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> unitrain.Loss:
        """The same mean."""
        amount, weight, _ = super().loss(model, batch)
        return unitrain.Loss(amount * 1e6, weight * 1e6)


class Half(Rare):
    """Parameters in bfloat16, which Horovod cannot sum."""

    def build_model(self) -> nn.Module:
        """The same model, half as large."""
        return super().build_model().bfloat16()

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> unitrain.Loss:
        """The same loss."""
        return super().loss(model, {**batch, "x": batch["x"].bfloat16()})


class Twice(Rare):
    """The same layer in two reentrant checkpoints: its gradient comes twice in one backward pass."""

    def build_model(self) -> nn.Module:
        """A layer that is used twice."""
        return nn.ModuleDict({"layer": nn.Linear(6, 6), "last": nn.Linear(6, 1)})

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean square."""
        hidden = batch["x"].requires_grad_()
        for _ in range(2):
            hidden = checkpoint(model["layer"], hidden, use_reentrant=True)
        return nn.functional.mse_loss(model["last"](hidden), batch["y"])
