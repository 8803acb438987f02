"""The Trainers that the integration tests run: small, uneven on purpose, and telling what they did."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import unitrain
from unitrain.tasks import LanguageModel
from unitrain.trainer_path import resolve_trainer

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


class Slower(Witness):
    """Slow enough for another process to keep pace with it on a machine that is busy."""

    seconds = 0.1


class Own(Rows):
    """Rows with an optimizer of torch's own."""

    def roles(self) -> dict[str, unitrain.Role]:
        """RMSprop with momentum."""
        return {"model": own_role(self)}


class Text(LanguageModel):
    """A language model that prints no sample at the end."""

    def finish(self) -> None:
        """See Trainer."""


class Several(Rows):
    """Four models that learn the same thing with other optimizers, or nothing at all."""

    def roles(self) -> dict[str, unitrain.Role]:
        """AdamW as the recipe has it, SGD with momentum, RMSprop, and a frozen one."""
        sgd = unitrain.OptimizerRecipe(name="sgd", lr=1e-2, momentum=0.9, clip=0.5)
        return {
            "model": self.role(self.recipe.optimizer),
            "sgd": self.role(sgd),
            "own": own_role(self),
            "frozen": self.role(None),
        }

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """One update of each; the losses of the other models go into `extra`."""
        for name in ("sgd", "own"):
            loss = self.engines[name].update(batch, self.hp(name)).read()["loss"]
            self.extra.setdefault(name, []).append(loss)
        return super().step(batch)

    def role(self, optimizer: unitrain.OptimizerRecipe | None, strategy: str | None = None) -> unitrain.Role:
        """A model with an optimizer."""
        return unitrain.Role(model=self.build_model, losses={"loss": self.loss}, optimizer=optimizer, strategy=strategy)


class Mixed(Several):
    """Two models, each on a strategy of its own."""

    def roles(self) -> dict[str, unitrain.Role]:
        """The first on the recipe's strategy."""
        return {"model": self.role(self.recipe.optimizer), "other": self.role(self.recipe.optimizer, "fsdp2")}

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """Both models, on the same batch."""
        self.engines["other"].update(batch, self.hp("other"))
        return self.engines["model"].update(batch, self.hp("model"))


class Counting(Rows):
    """Keeps the sums and weights of its evaluations."""

    def evaluate(self) -> dict[str, float]:
        """See Trainer."""
        assert self._eval_feed is not None, "there is an evaluation split"
        sums = self.engines["model"].evaluate(self._eval_feed.sweep())
        self.extra.update({name: list(pair) for name, pair in sums.items()})
        return {name: amount / weight for name, (amount, weight) in sums.items()}


class Failing(Rows):
    """Fails before step 6 as long as there is no file `pass` in the run's folder."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """One update, or the failure."""
        assert self.run is not None, "the run has started"
        if self.cursor.step == 5 and not (self.run.folder / "pass").exists():
            raise RuntimeError("this step fails")
        return super().step(batch)


class FailsOnce(Slow):
    """Rank 1 fails once, in step 12."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """One update, or the failure."""
        assert self.run is not None, "the run has started"
        marker = self.run.folder / "failed"
        if self.cursor.step == 11 and self.world.rank == 1 and not marker.exists():
            marker.touch()
            raise RuntimeError("this step fails once")
        return super().step(batch)


class LostSlot(Slow):
    """Rank 1 never comes to its first step."""

    def build_source(self, split: str) -> unitrain.Source:
        """It ends without a word."""
        if self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().build_source(split)


class NeverSteps(Rows):
    """A mistake in the user's code."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """No update."""
        raise TypeError("step takes no batch")


class Signalled(Rows):
    """Gets the signal that the run's folder names, in step 6 of its first attempt."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """One update."""
        assert self.run is not None, "the run has started"
        order = self.run.folder / "signal"
        if self.cursor.step == 5 and order.exists():
            number = int(order.read_text())
            order.unlink()
            os.kill(os.getpid(), number)
        return super().step(batch)


class Fewer(Rows):
    """The same with other data."""

    def build_source(self, split: str) -> unitrain.Source:
        """The first half."""
        whole = super().build_source(split)
        return unitrain.ArraySource(**whole.fetch(np.arange(len(whole) // 2)))


class Adversaries(Rows):
    """Two roles, each of whose losses runs the other's model: one draws, one tells drawn from given."""

    def roles(self) -> dict[str, unitrain.Role]:
        """The first draws one number from six, the second judges a number."""
        fast = replace(self.recipe.optimizer, lr=2 * self.recipe.optimizer.lr)
        drawing = unitrain.Role(
            model=lambda: network(6), losses={"loss": self.deceive}, optimizer=self.recipe.optimizer
        )
        telling = unitrain.Role(model=lambda: network(1), losses={"loss": self.tell}, optimizer=fast)
        return {"drawing": drawing, "telling": telling}

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """Both roles on the same batch; the second one's loss is kept."""
        told = self.engines["telling"].update(batch, self.hp("telling")).read()["loss"]
        self.extra.setdefault("told", []).append(told)
        return self.engines["drawing"].update(batch, self.hp("drawing"))

    def tell(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        """Given is 1, drawn is 0."""
        with torch.no_grad():
            drawn = self.engines["drawing"].model(batch["x"])
        return (model(batch["y"]) - 1).square().mean() + model(drawn).square().mean()

    def deceive(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        """What is drawn should be told to be given."""
        return (self.engines["telling"].model(model(batch["x"])) - 1).square().mean()


class KeptByDeepSpeed(Rows):
    """Also writes a checkpoint by DeepSpeed's own way."""

    def finish(self) -> None:
        """See Trainer."""
        assert self.run is not None, "the run has started"
        engine: Any = self.engines["model"]
        engine.engine.save_checkpoint(str(self.run.folder / "deepspeed"))


def own_role(trainer: Rows) -> unitrain.Role:
    """A role whose optimizer is a torch optimizer."""

    def optimizer(params: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(params, lr=1e-2, momentum=0.9, centered=True)

    return unitrain.Role(model=trainer.build_model, losses={"loss": trainer.loss}, optimizer=optimizer)


def fit_all(strategy: str, folders: list[str]) -> None:
    """Train the runs in these folders to their ends, one after the other."""
    for folder in folders:
        recipe = unitrain.load_recipe(Path(folder) / "recipe.yaml", strategy=strategy)
        resolve_trainer(recipe.trainer)(recipe, run_dir=folder).fit()


if __name__ == "__main__":
    fit_all(sys.argv[1], sys.argv[2:])


def network(inputs: int) -> nn.Module:
    """(rows, inputs) -> (rows, 1)."""
    return nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, 1))
