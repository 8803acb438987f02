"""What the ranks of a conformance run do: train, save, load, meet a non-finite gradient; rank 0 writes it all down.

Started by `run_scenario` through our own agent, once for a strategy and a number of ranks.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unitrain import registry
from unitrain.checkpoint import CheckpointReader, Saver, list_checkpoints
from unitrain.data.feed import Feed
from unitrain.data.source import Source
from unitrain.recipe import LauncherRecipe, OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategy import Engine, HyperParameters, Role, Strategy
from unitrain.world import World

from .toy import ToySource, initial_value

SEED, GLOBAL_BATCH, FIRST, SECOND, POISONED = 7, 10, 4, 8, 3
OPTIMIZER = OptimizerRecipe(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, clip=0.5)
OTHER_SEED = 8  # of an engine whose state is about to be loaded
MODELS = {  # framework -> module with ToyModel, toy_loss and probe
    "torch": "unitrain.testing.toy_torch",
    "jax": "unitrain.testing.toy_jax",
    "tensorflow": "unitrain.testing.toy_tf",
}
TIMEOUT_SECONDS = 600


def rate(step: int) -> float:
    """The learning rate of a step: never the same twice, so that a wrong one shows."""
    return OPTIMIZER.lr * (1 + step % 3)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run of the scenario gave."""

    strategy: str
    ranks: int
    curve: list[dict[str, float]]  # StepOut.read() of steps 0..7
    again: list[dict[str, float]]  # of steps 4..7, by a fresh engine that loaded the checkpoint of step 4
    evaluation: dict[str, list[float]]  # after step 4: name -> [sum, weight] over the whole data
    called: list[float]  # what `call` returned on each rank: a forward pass over the first rows
    training_in_call: bool
    initial_digest: dict[str, int]
    digest: dict[str, int]  # after step 4
    poisoned: dict[str, float]  # StepOut.read() of an update with a non-finite gradient, after step 8
    after: dict[str, float]  # of a sound update after it
    checkpoints: dict[str, str]  # "first" (step 4), "second" (step 8), "poisoned", "copied" -> folder
    continued: list[dict[str, float]] = field(default_factory=list)  # of steps 4..7 after loading `load_from`
    copied_digest: dict[str, int] = field(default_factory=dict)  # just after that load


def run_scenario(
    folder: Path,
    strategy: str,
    ranks: int,
    *,
    options: Mapping[str, Any] | None = None,
    micro_batch: int | None = 2,
    load_from: str = "",
    accelerator: bool = False,
    preload: tuple[str, ...] = (),
) -> Outcome:
    """Run the scenario in real processes and return what rank 0 wrote down.

    `strategy` is a registered name or module:Class; `load_from` a checkpoint that any strategy wrote at step 4;
    `preload` what to import once and fork ranks from, where that is safe and the registry does not know it.
    Raises RuntimeError with the agent's output where a rank fails.
    """
    folder.mkdir(parents=True)
    task = {
        "strategy": strategy,
        "options": dict(options or {}),
        "micro_batch": micro_batch,
        "load_from": load_from,
        "folder": str(folder),
        "ranks": ranks,
    }
    entry = registry.entry("strategies", strategy)
    (folder / "task.json").write_text(json.dumps(task))
    job = {
        "run_id": folder.name,
        "launcher": "local",
        "nodes": 1,
        "nproc": 1 if entry.inner else ranks,  # a controller starts its ranks itself
        "preload": list(preload or entry.preload),
        "fork": bool(preload) or entry.fork,
        "options": {"entry": "unitrain.testing.scenario:main"},
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "unitrain.agent", str(folder)]
    environ = ["env"] if accelerator else ["env", "CUDA_VISIBLE_DEVICES="]
    done = subprocess.run([*environ, *command], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{strategy} on {ranks} ranks failed:\n{done.stdout}{done.stderr}")
    return Outcome(**json.loads((folder / "outcome.json").read_text()))


def main(arguments: list[str]) -> int:
    """One rank's part; `arguments` is the folder that `run_scenario` made."""
    task = json.loads((Path(arguments[0]) / "task.json").read_text())
    world = World.from_environment()
    recipe = Recipe(
        trainer="unitrain.testing:none",
        optimizer=OPTIMIZER,
        train=TrainRecipe(global_batch=GLOBAL_BATCH, micro_batch=task["micro_batch"], seed=SEED),
        strategy=StrategyRecipe(name=task["strategy"], options=task["options"]),
        launcher=LauncherRecipe(nproc=task["ranks"]),
    )
    strategy: Strategy = registry.load("strategies", task["strategy"])(recipe)
    strategy.open(world)
    try:
        outcome = _Rank(strategy, world, recipe, Path(task["folder"])).play(task["load_from"])
        if world.first:
            text = json.dumps(dataclasses.asdict(outcome))
            (Path(task["folder"]) / "outcome.json").write_text(text)
        strategy.barrier()
    finally:
        strategy.close()
    return 0


class _Rank:
    """The scenario, as one rank plays it."""

    def __init__(self, strategy: Strategy, world: World, recipe: Recipe, folder: Path) -> None:
        self.strategy, self.world, self.recipe, self.folder = strategy, world, recipe, folder
        toy = registry.resolve(f"{MODELS[strategy.framework]}:ToyModel")
        loss = registry.resolve(f"{MODELS[strategy.framework]}:toy_loss")
        self.probe = registry.resolve(f"{MODELS[strategy.framework]}:probe")
        self.role = Role(model=toy, losses={"loss": loss}, optimizer=OPTIMIZER, initial=initial_value)

    def play(self, load_from: str) -> Outcome:
        engine = self.strategy.bind(self.role, SEED)
        feed = self._feed(ToySource())
        initial = engine.digest()
        curve = self._train(engine, feed, range(FIRST))
        checkpoints = {"first": self._save(engine, FIRST)}
        evaluation = {name: list(pair) for name, pair in engine.evaluate(feed.sweep()).items()}
        called, training = engine.call(self.probe)
        digest = engine.digest()
        curve += self._train(engine, feed, range(FIRST, SECOND))
        checkpoints["second"] = self._save(engine, SECOND)
        poisoned = self._poison(engine)
        checkpoints["poisoned"] = self._save(engine, SECOND + 1)
        after = self._train(engine, feed, range(SECOND, SECOND + 1))[0]

        again = self._train(self._loaded(checkpoints["first"]), feed, range(FIRST, SECOND))
        continued, copied_digest = [], {}
        if load_from:
            other = self._loaded(load_from)
            copied_digest = other.digest()
            checkpoints["copied"] = self._save(other, SECOND + 2)
            continued = self._train(other, feed, range(FIRST, SECOND))
        feed.close()
        return Outcome(
            strategy=self.recipe.strategy.name,
            ranks=self.strategy.num_ranks(self.world),
            curve=curve,
            again=again,
            evaluation=evaluation,
            called=called,
            training_in_call=training,
            initial_digest=initial,
            digest=digest,
            poisoned=poisoned,
            after=after,
            checkpoints=checkpoints,
            continued=continued,
            copied_digest=copied_digest,
        )

    def _feed(self, source: Source) -> Feed:
        train = self.recipe.train
        share, shares = self.strategy.data_share(self.world)
        return Feed(
            source,
            seed=train.seed,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            rank=share,
            size=shares,
            place=self.strategy.place,
            even=self.strategy.even,
            elsewhere=self.strategy.elsewhere,
        )

    def _train(self, engine: Engine, feed: Feed, steps: range) -> list[dict[str, float]]:
        return [engine.update(feed.batch(step), HyperParameters(rate(step), OPTIMIZER.clip)).read() for step in steps]

    def _poison(self, engine: Engine) -> dict[str, float]:
        """One row of one rank gives an infinite gradient."""
        sound = self._feed(ToySource())
        last = int(sound.batch(POISONED).ids[-1])
        sound.close()
        feed = self._feed(ToySource(poison=last))
        out = engine.update(feed.batch(POISONED), HyperParameters(rate(POISONED), OPTIMIZER.clip)).read()
        feed.close()
        return out

    def _save(self, engine: Engine, step: int) -> str:
        """A checkpoint by the real Saver; its folder."""
        root = str(self.folder / "checkpoints")
        saver = Saver(
            root,
            writer=self.world.rank,
            writers=self.world.size,
            nonce=self.strategy.share("c0ffee"),
            keep=100,
            asynchronous=False,
            producer={"strategy": self.recipe.strategy.name},
            report=lambda report: None,
        )
        saver.save(step, {"model": engine.shards()}, {"step": step})
        saver.wait()
        saver.close()
        self.strategy.barrier()
        folders = {found.step: found.folder for found in list_checkpoints(root).sound}
        if step not in folders:
            raise RuntimeError(f"the checkpoint of step {step} is not among the sound ones: {sorted(folders)}")
        return folders[step]

    def _loaded(self, folder: str) -> Engine:
        """A fresh engine, whose own initial weights differ, with the state of a checkpoint."""
        engine = self.strategy.bind(self.role, OTHER_SEED)
        engine.load(CheckpointReader(folder).role("model")).require_all(folder)
        return engine
