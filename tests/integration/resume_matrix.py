"""Every strategy goes on with the checkpoints of every other: what the ranks of test_resume_matrix.py do.

Hundreds of pairs cost few starts of Python: see forked.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forked import Found, Shape
from forked import run_shapes as run_forked

from unitrain import registry
from unitrain.checkpoint import CheckpointReader, Saver, list_checkpoints
from unitrain.data.feed import Feed
from unitrain.recipe import LauncherRecipe, OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategy import Engine, HyperParameters, Role, Strategy
from unitrain.testing.scenario import MODELS
from unitrain.testing.toy import ToySource, initial_value
from unitrain.world import World

SEED, OTHER_SEED, GLOBAL_BATCH, MICRO_BATCH = 5, 6, 11, 4
MOST_RANKS = 3
SAVED, MORE = 20, 10  # steps before the checkpoint, and after it
OPTIMIZER = OptimizerRecipe(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, clip=0.5)


def recipe_of(shape: Shape) -> Recipe:
    """The toy problem on that shape."""
    return Recipe(
        trainer="unitrain.testing:none",
        optimizer=OPTIMIZER,
        train=TrainRecipe(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, seed=SEED),
        strategy=StrategyRecipe(name=shape.strategy),
        launcher=LauncherRecipe(nproc=shape.ranks),
    )


def chosen(source: Shape, shape: Shape) -> bool:
    """Whether a shape goes on with the checkpoint of another where not all pairs are tried.

    Of every strategy that with the next number of ranks, and its own, which must go on to the bit.
    """
    return source == shape or source.ranks == shape.ranks % MOST_RANKS + 1 or source.strategy == "single"


def run_shapes(folder: Path, act: str, shapes: list[Shape]) -> Found:
    """Let each shape "write" its checkpoint, "resume" those chosen for it, or "resume all": what its ranks found.

    In place of that, how they failed.
    """
    return run_forked("resume_matrix:part", folder, act, shapes)


def part(folder: Path, act: str, shape: Shape) -> dict[str, Any]:
    """One rank's part."""
    recipe = recipe_of(shape)
    strategy: Strategy = registry.load("strategies", shape.strategy)(recipe)
    strategy.open(World.from_environment())
    player = _Rank(strategy, World.from_environment(), recipe)
    found = player.write(folder / str(shape)) if act == "write" else player.resume(folder, shape, act == "resume all")
    strategy.barrier()
    strategy.close()
    return found


class _Rank:
    """One rank's part."""

    def __init__(self, strategy: Strategy, world: World, recipe: Recipe) -> None:
        self.strategy, self.world = strategy, world
        module = MODELS[strategy.framework]
        model, loss = (registry.resolve(f"{module}:{name}") for name in ("ToyModel", "toy_loss"))
        self.role = Role(model=model, losses={"loss": loss}, optimizer=OPTIMIZER, initial=initial_value)
        share, shares = strategy.data_share(world)
        self.feed = Feed(
            ToySource(),
            seed=SEED,
            global_batch=GLOBAL_BATCH,
            micro_batch=MICRO_BATCH,
            rank=share,
            size=shares,
            place=strategy.place,
            even=strategy.even,
        )

    def write(self, root: Path) -> dict[str, Any]:
        """Train, save, and go on as if nothing had been saved."""
        engine = self.strategy.bind(self.role, SEED)
        self._train(engine, range(SAVED))
        saver = Saver(
            str(root),
            writer=self.world.rank,
            writers=self.world.size,
            nonce=self.strategy.share("c0ffee"),
            keep=1,
            asynchronous=False,
            producer={"strategy": root.name},
            report=lambda report: None,
        )
        saver.save(SAVED, {"model": engine.shards()}, {})
        saver.wait()
        saver.close()
        losses = self._train(engine, range(SAVED, SAVED + MORE))
        self.feed.close()
        return {"losses": losses}

    def resume(self, folder: Path, shape: Shape, everything: bool) -> dict[str, Any]:
        """Load one checkpoint after another, look at what the engine then holds, and go on."""
        found = {}
        for name, reader in _checkpoints(folder):
            if not (everything or chosen(Shape.of(name), shape)):
                continue
            engine = self.strategy.bind(self.role, OTHER_SEED)
            engine.load(reader.role("model")).require_all(reader.folder)
            changed, held = self._compare(engine, reader)
            losses = self._train(engine, range(SAVED, SAVED + MORE))
            found[name] = {"losses": losses, "changed": changed, "held": held}
        self.feed.close()
        return found

    def _compare(self, engine: Engine, reader: CheckpointReader) -> tuple[list[str], dict[str, int]]:
        """Tensors whose bits here differ from the checkpoint's, and how many elements this rank holds of each."""
        there = reader.role("model")
        changed, held = [], {}
        for shard in engine.shards():
            tensor = f"{shard.kind} {shard.name}"
            held[tensor] = held.get(tensor, 0) + shard.data.size
            box = there.read(shard.kind, shard.name, shard.offset, shard.data.shape)
            if box.dtype != shard.data.dtype or box.tobytes() != shard.data.tobytes():
                changed.append(tensor)
        return changed, held

    def _train(self, engine: Engine, steps: range) -> list[float]:
        def rate(step: int) -> float:
            return OPTIMIZER.lr * (1 + step % 3)  # never the same twice in a row, so that a wrong one shows

        outs = [engine.update(self.feed.batch(n), HyperParameters(rate(n), OPTIMIZER.clip)).read() for n in steps]
        return [out["loss"] for out in outs]


def _checkpoints(folder: Path) -> Iterator[tuple[str, CheckpointReader]]:
    """What every shape has written, by the shape's name."""
    for root in sorted(path for path in folder.iterdir() if path.is_dir()):
        for found in list_checkpoints(str(root)).sound:
            yield root.name, CheckpointReader(found.folder)
