"""The Trainers that the integration tests run: small, uneven on purpose, and telling what they did."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from torch import nn

import unitrain
from unitrain.tasks import LanguageModel

NUM_ROWS = {"train": 203, "eval": 37}  # odd: no batch size and no number of ranks divides them


class Rows(unitrain.Trainer):
    """Weighted least squares: rows count from 0 to 16, so that a mean of means is far from the mean."""

    def build_model(self) -> nn.Module:
        """Two layers whose sizes no number of ranks divides."""
        return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 1))

    def build_source(self, split: str) -> unitrain.Source:
        """x (rows, 6), y (rows, 1), weight (rows,), all float32, and number (rows,), int64: the sample's id."""
        draws = np.random.default_rng({"train": 0, "eval": 1}[split])
        rows = NUM_ROWS[split]
        x = draws.standard_normal((rows, 6)).astype(np.float32)
        y = np.tanh(x[:, :1] * x[:, 1:2]) + 0.1 * draws.standard_normal((rows, 1)).astype(np.float32)
        weight = draws.integers(0, 5, rows).astype(np.float32) ** 2
        return unitrain.ArraySource(x=x, y=y.astype(np.float32), weight=weight, number=np.arange(rows))

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> unitrain.Loss:
        """Sum of weighted squares; also the mean number of a sample."""
        errors = (model(batch["x"]) - batch["y"]).square().sum(dim=1)
        metrics = {"number": (batch["number"].sum(), len(errors))}
        return unitrain.Loss((errors * batch["weight"]).sum(), batch["weight"].sum(), metrics)


class Witness(Rows):
    """Writes the step and the samples that each rank trained on, before the update, to a file of the rank's own."""

    seconds = 0.0  # of sleep in each step

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """One line, then the update."""
        assert self.run is not None, "the run has started"
        mine = [number for micro in batch.micro() if not micro.filler for number in micro.arrays["number"].tolist()]
        with (self.run.folder / f"samples-{self.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": batch.step + 1, "ids": mine}) + "\n")
        time.sleep(self.seconds)
        return super().step(batch)


class Slow(Witness):
    """Slow enough to be killed in the middle of a step that is known."""

    seconds = 0.01


class Sluggish(Slow):
    """The same for torch optimizers of one's own."""

    def roles(self) -> dict[str, unitrain.Role]:
        """RMSprop with momentum."""
        return {"model": own_role(self)}


class Own(Rows):
    """Rows with an optimizer of torch's own."""

    def roles(self) -> dict[str, unitrain.Role]:
        """RMSprop with momentum."""
        return {"model": own_role(self)}


class Text(LanguageModel):
    """A language model that prints no sample at the end."""

    def finish(self) -> None:
        """See Trainer."""


class Mixed(Rows):
    """Two models, each on a strategy of its own, that learn the same thing."""

    def roles(self) -> dict[str, unitrain.Role]:
        """The first on the recipe's strategy."""

        def role(strategy: str | None) -> unitrain.Role:
            optimizer = self.recipe.optimizer
            return unitrain.Role(
                model=self.build_model, losses={"loss": self.loss}, optimizer=optimizer, strategy=strategy
            )

        return {"model": role(None), "other": role("fsdp2")}

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """Both models, on the same batch."""
        other = self.engines["other"].update(batch, self.hp("other")).read()
        out = self.engines["model"].update(batch, self.hp("model"))
        self.extra.setdefault("other", []).append(other["loss"])
        return out


def own_role(trainer: Rows) -> unitrain.Role:
    """A role whose optimizer is a torch optimizer."""

    def optimizer(params: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(params, lr=1e-2, momentum=0.9, centered=True)

    return unitrain.Role(model=trainer.build_model, losses={"loss": trainer.loss}, optimizer=optimizer)
