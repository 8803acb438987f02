"""Trainers whose ranks are Ray actors, and a script that runs them while their actors, or their nodes, are killed.

`python ray_trainers.py faults|nodes FOLDER`
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unitrain import ArraySource, Recipe, Role, Trainer, load_recipe
from unitrain.recipe import StrategyRecipe

STEPS, KILLED, STOPPED = 24, 9, 17
DRY = "model={name: mine, dropout: 0.0}"


class Rows(Trainer):
    """A small network; `model.mistake` is the step whose loss raises, `model.pause` the seconds that each takes."""

    def build_model(self) -> nn.Module:
        return network(8, 1, self.recipe.model.options.get("dropout", 0.1))

    def build_source(self, split: str) -> ArraySource:
        draws = np.random.default_rng(0 if split == "train" else 1)
        x = draws.normal(size=(300, 8)).astype(np.float32)
        return ArraySource(x=x, y=x.sum(1, keepdims=True))

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        if self.cursor.step == self.recipe.model.options.get("mistake") and self.world.rank == 1:
            raise MyMistakeError("the second rank's loss is wrong")
        time.sleep(self.recipe.model.options.get("pause", 0.0))
        return (model(batch["x"]) - batch["y"]).square().mean()


class MyMistakeError(Exception):
    """Of a user's own."""


class Pair(Rows):
    """Two models, each of which is in the other's loss."""

    def roles(self) -> dict[str, Role]:
        optimizer = self.recipe.optimizer
        return {
            "first": Role(model=lambda: network(8, 8), losses={"loss": self.follow}, optimizer=optimizer),
            "second": Role(model=lambda: network(8, 8), losses={"loss": self.lead}, optimizer=optimizer),
        }

    def step(self, batch: Any) -> Any:
        self.engines["first"].update(batch, self.hp("first"))
        return self.engines["second"].update(batch, self.hp("second"))

    def follow(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            wanted = self.engines["second"].model(batch["x"])
        return (model(batch["x"]) - wanted).square().mean()

    def lead(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        return (self.engines["first"].model(model(batch["x"])) - batch["y"]).square().mean()


def network(inputs: int, outputs: int, dropout: float = 0.1) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, outputs))


def fit(
    kind: type[Trainer], folder: Path, at: Mapping[int, Callable[[Any], None]], *overrides: str, **options: Any
) -> Trainer:
    """Train, and do something to the group of actors after some of the steps."""
    recipe: Recipe = load_recipe(folder.parent / "recipe.yaml", overrides)
    recipe = recipe.replace(strategy=StrategyRecipe(name="ray", options={"actors": 2, **options}))
    trainer = kind(recipe, run_dir=folder)
    for _ in trainer.steps():
        if trainer.cursor.step in at:
            at[trainer.cursor.step](trainer._control.crew._group)  # type: ignore[attr-defined]  # of this strategy
    return trainer


def faults(folder: Path) -> dict[str, Any]:
    """A run in peace; one whose actors are killed and stopped; two models; a user's mistake."""
    from unitrain.actors.cluster_ray import private_or_running

    def send(number: signal.Signals) -> Callable[[Any], None]:
        return lambda group: os.kill(group.members[-1].pid, number)

    told: dict[str, Any] = {"pid": os.getpid()}
    with private_or_running(None, cpus=2, name="faults"):
        fit(Rows, folder / "peace", {})
        at = {KILLED: send(signal.SIGKILL), STOPPED: send(signal.SIGSTOP)}
        began = time.monotonic()
        fit(Rows, folder / "faults", at, silent_seconds=4, snapshot_every=6)
        told["seconds"] = time.monotonic() - began
        fit(Pair, folder / "pair", {7: send(signal.SIGKILL)}, "train.eval_every=0")
        fit(Rows, folder / "fsdp2", {KILLED: send(signal.SIGKILL)}, inner="fsdp2")
        try:
            fit(Rows, folder / "mistake", {}, "model={name: mine, mistake: 5}")
        except MyMistakeError as error:
            told["mistake"] = [str(error), *error.__notes__]
        try:
            fit(Rows, folder / "crowd", {}, actors=3, room_seconds=2)
        except Exception as error:
            told["crowd"] = [type(error).__name__, str(error)]
        again = {step: send(signal.SIGKILL) for step in range(1, STEPS)}
        try:
            fit(Rows, folder / "doomed", again, replacements=0)
        except Exception as error:
            told["doomed"] = [type(error).__name__, str(error)]
    return told


def nodes(folder: Path) -> dict[str, Any]:
    """Logical nodes of one CPU each: one is lost while there is a spare, another when there is none."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0123456789abcdef" * 4)
    import ray
    from ray.cluster_utils import Cluster

    own = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.2"}
    short = tempfile.mkdtemp(prefix="uray-", dir="/tmp")  # sockets below it have names of 107 letters at most
    cluster = Cluster(initialize_head=True, head_node_args={**own, "include_dashboard": False, "temp_dir": short})
    others = {node.node_id: node for node in (cluster.add_node(**own), cluster.add_node(**own))}
    cluster.connect()
    told: dict[str, Any] = {}

    def lose(group: Any) -> None:
        lost = next(member for member in group.members if member.node in others)
        cluster.remove_node(others.pop(lost.node), allow_graceful=False)
        deadline = time.monotonic() + 60
        while Path(f"/proc/{lost.pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)  # it trains until it has noticed that its node is gone

    try:
        at = {KILLED: lose, STOPPED: lose}
        # Without dropout, whose masks are those of micro-batches, of which one rank has others than two.
        fit(Rows, folder / "nodes", at, DRY, placement="STRICT_SPREAD", min_actors=1, room_seconds=3)
        told["left"] = len(others)
    finally:
        ray.shutdown()
        with contextlib.suppress(AttributeError):  # of a node that is gone already
            cluster.shutdown()
        shutil.rmtree(short, ignore_errors=True)
    return told


if __name__ == "__main__":
    part, place = {"faults": faults, "nodes": nodes}[sys.argv[1]], Path(sys.argv[2])
    (place / f"{sys.argv[1]}.json").write_text(json.dumps(part(place)))
