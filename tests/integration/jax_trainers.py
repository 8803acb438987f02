"""Trainers in JAX that the integration tests run: as uneven as those of trainers.py, in NNX or as pure functions."""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import unitrain

NUM_ROWS = {"train": 203, "eval": 37}  # odd: no batch size and no number of ranks divides them


class Net(nnx.Module):
    """Two layers whose sizes no number of ranks divides, with dropout and running statistics between if asked."""

    def __init__(self, *, dropout: float = 0.0, norm: bool = False) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(6, 11, rngs=rngs)
        self.norm = nnx.BatchNorm(11, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.last = nnx.Linear(11, 1, rngs=rngs)
        self.scale = jnp.ones(())  # an array that is no variable

    def __call__(self, x: jax.Array) -> jax.Array:
        """(rows, 6) to (rows, 1)."""
        x = self.first(x) * self.scale
        x = x if self.norm is None else self.norm(x)
        out: jax.Array = self.last(self.dropout(jnp.tanh(x)))
        return out


class Rows(unitrain.Trainer):
    """Weighted least squares: rows count from 0 to 16, so that a mean of means is far from the mean."""

    seconds = 0.0  # of sleep in each step

    def build_model(self) -> Any:
        """See Net."""
        return Net()

    def build_source(self, split: str) -> unitrain.Source:
        """x (rows, 6), y (rows, 1), weight (rows,), all float32, and number (rows,), int64: the sample's id."""
        draws = np.random.default_rng({"train": 0, "eval": 1}[split])
        rows = NUM_ROWS[split]
        x = draws.standard_normal((rows, 6)).astype(np.float32)
        y = np.tanh(x[:, :1] * x[:, 1:2]) + 0.1 * draws.standard_normal((rows, 1)).astype(np.float32)
        weight = draws.integers(0, 5, rows).astype(np.float32) ** 2
        return unitrain.ArraySource(x=x, y=y.astype(np.float32), weight=weight, number=np.arange(rows))

    def loss(self, model: Any, batch: Any) -> Any:
        """Sum of weighted squares; also the mean number of a sample."""
        errors = jnp.square(model(batch["x"]) - batch["y"]).sum(axis=1)
        metrics = {"number": (batch["number"].sum(), len(errors))}
        return unitrain.Loss((errors * batch["weight"]).sum(), batch["weight"].sum(), metrics)

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """One line of a file of the rank's own with the samples that it trains on, then the update."""
        assert self.run is not None, "the run has started"
        mine = [number for micro in batch.micro() if not micro.filler for number in micro.arrays["number"].tolist()]
        with (self.run.folder / f"samples-{self.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": batch.step + 1, "ids": mine}) + "\n")
        time.sleep(self.seconds)
        return super().step(batch)


class Slow(Rows):
    """Slow enough to be killed in the middle of a step that is known."""

    seconds = 0.05


class Noisy(Rows):
    """With dropout and batch norm."""

    def build_model(self) -> Any:
        """See Net."""
        return Net(dropout=0.3, norm=True)


class Pure(Rows):
    """A pair of pure functions, and the mean over rows as its loss."""

    def build_model(self) -> Any:
        """(init, apply)."""

        def init(key: jax.Array) -> Any:
            first, second = jax.random.split(key)
            return {"first": 0.4 * jax.random.normal(first, (6, 11)), "last": 0.3 * jax.random.normal(second, (11, 1))}

        def apply(values: Any, x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ values["first"]) @ values["last"]

        return init, apply

    def loss(self, model: Any, batch: Any) -> Any:
        """The mean."""
        return jnp.square(model(batch["x"]) - batch["y"]).mean()


class Own(Rows):
    """With an optimizer of optax's."""

    def roles(self) -> dict[str, unitrain.Role]:
        """RMSprop with momentum."""

        def optimizer(params: Any) -> optax.GradientTransformation:
            assert set(params) == {"first.kernel", "first.bias", "last.kernel", "last.bias"}
            return optax.rmsprop(1e-2, momentum=0.5)

        return {"model": unitrain.Role(model=self.build_model, losses={"loss": self.loss}, optimizer=optimizer)}


class Distilled(Rows):
    """Two models, of which one learns from the other."""

    def roles(self) -> dict[str, unitrain.Role]:
        """A teacher with an optimizer of its own, and a pupil."""
        teacher = unitrain.Role(
            model=self.build_model,
            losses={"loss": self.loss},
            optimizer=unitrain.OptimizerRecipe(name="sgd", lr=1e-2, momentum=0.9),
        )
        pupil = unitrain.Role(
            model=Net, losses={"loss": self.imitate}, optimizer=unitrain.OptimizerRecipe(name="sgd", lr=1e-2, clip=0.5)
        )
        return {"model": teacher, "pupil": pupil}

    def imitate(self, model: Any, batch: Any) -> Any:
        """Squared distance to twice what the teacher says."""
        wanted = 2 * self.engines["model"].model(batch["x"])
        return jnp.square(model(batch["x"]) - wanted).mean()

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """First the pupil, then the teacher."""
        out = self.engines["pupil"].update(batch, self.hp("pupil"))
        self.extra.setdefault("pupil", []).append(out.read()["loss"])
        return super().step(batch)


class FailsOnOne(Rows):
    """Rank 1 raises in step 4, when rank 0 already waits for it."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """See Trainer."""
        if self.world.rank == 1 and batch.step == 3:
            time.sleep(0.3)
            raise ValueError("rank 1 has had enough")
        return super().step(batch)
