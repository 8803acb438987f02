"""Every strategy goes on with the checkpoints of every other: what the ranks of test_resume_matrix.py do.

`python resume_matrix.py TASK` imports what its strategies need once, and forks the ranks of one shape (a strategy on a
number of ranks) after the other: hundreds of pairs then cost two starts of Python a framework.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from unitrain import registry
from unitrain.agent.rank import die_with, write_to
from unitrain.checkpoint import CheckpointReader, Saver, list_checkpoints
from unitrain.data.feed import Feed
from unitrain.recipe import LauncherRecipe, OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategy import Engine, HyperParameters, Role, Strategy
from unitrain.testing.scenario import MODELS
from unitrain.testing.toy import ToySource, initial_value
from unitrain.world import World

SEED, OTHER_SEED, GLOBAL_BATCH, MICRO_BATCH = 5, 6, 11, 4
SAVED, MORE = 4, 10  # steps before the checkpoint, and after it
OPTIMIZER = OptimizerRecipe(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, clip=0.5)
RANK_SECONDS, TASK_SECONDS = 240, 800
MOST_SHAPES = 8  # of one process
OWN_THREADS = Path("/proc/self/task")


class Shape(NamedTuple):
    """A strategy on a number of ranks."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy}-{self.ranks}"


def recipe_of(shape: Shape) -> Recipe:
    """The toy problem on that shape."""
    return Recipe(
        trainer="unitrain.testing:none",
        optimizer=OPTIMIZER,
        train=TrainRecipe(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, seed=SEED),
        strategy=StrategyRecipe(name=shape.strategy),
        launcher=LauncherRecipe(nproc=shape.ranks),
    )


def run_shapes(folder: Path, act: str, shapes: list[Shape]) -> dict[Shape, list[dict[str, Any]] | str]:
    """Let each shape "write" its checkpoint, or "resume" all of them: what its ranks found, or how they failed."""
    tasks = list(_tasks(shapes))
    found: dict[Shape, list[dict[str, Any]] | str] = {}
    with ThreadPoolExecutor(2) as pool:  # most of their time ranks wait for each other
        for results in pool.map(lambda numbered: _run_task(folder, act, *numbered), enumerate(tasks)):
            found.update(results)
    return found


def _tasks(shapes: list[Shape]) -> Iterator[list[Shape]]:
    """Shapes that need the same modules, a few at a time."""
    together: dict[tuple[str, ...], list[Shape]] = {}
    for shape in shapes:
        together.setdefault(registry.entry("strategies", shape.strategy).preload, []).append(shape)
    for group in together.values():
        parts = -(-len(group) // MOST_SHAPES)
        yield from (group[number::parts] for number in range(parts))


def _run_task(folder: Path, act: str, number: int, group: list[Shape]) -> dict[Shape, list[dict[str, Any]] | str]:
    preload = registry.entry("strategies", group[0].strategy).preload
    path = folder / f"{act}-{number}.json"
    path.write_text(json.dumps({"act": act, "folder": str(folder), "preload": preload, "shapes": group}))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TASK_SECONDS, check=False)
    found: dict[Shape, list[dict[str, Any]] | str] = {}
    for shape in group:
        files = [folder / f"{act}-{shape}-{rank}.json" for rank in range(shape.ranks)]
        if done.returncode or not all(file.exists() for file in files):
            logs = [file.with_suffix(".log") for file in files]
            said = [log.read_text()[-3000:] for log in logs if log.exists()]
            found[shape] = "\n".join([f"{shape} failed to {act}", done.stdout, done.stderr, *said])
        else:
            found[shape] = [json.loads(file.read_text()) for file in files]
    return found


def main() -> None:
    """Run a task: all ranks of a shape at once, one shape after the other."""
    task = json.loads(Path(sys.argv[1]).read_text())
    for module in task["preload"]:
        importlib.import_module(module)
    if "deepspeed" in sys.modules:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # else every rank does, for seconds
    gc.freeze()  # DeepSpeed collects garbage at every turn
    threads = len(list(OWN_THREADS.iterdir()))
    if threads != 1:
        raise SystemExit(f"{task['preload']} start threads ({threads}), so that ranks cannot be forked here")
    for shape in (Shape(*values) for values in task["shapes"]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = [_fork(task, shape, rank, port) for rank in range(shape.ranks)]
        for pid in pids:
            os.waitpid(pid, 0)  # its result file tells whether it succeeded


def _fork(task: dict[str, Any], shape: Shape, rank: int, port: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(task, shape, rank, port, parent)
    return pid


def _become(task: dict[str, Any], shape: Shape, rank: int, port: int, parent: int) -> NoReturn:
    code = 1
    try:
        die_with(parent, signal.SIGKILL)
        signal.alarm(RANK_SECONDS)
        folder = Path(task["folder"])
        write_to(str(folder / f"{task['act']}-{shape}-{rank}.log"))
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(shape.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(shape.ranks))
        recipe = recipe_of(shape)
        strategy: Strategy = registry.load("strategies", shape.strategy)(recipe)
        strategy.open(World.from_environment())
        player = _Rank(strategy, World.from_environment(), recipe)
        found = player.write(folder / str(shape)) if task["act"] == "write" else player.resume(folder)
        strategy.barrier()
        strategy.close()
        (folder / f"{task['act']}-{shape}-{rank}.json").write_text(json.dumps(found))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Rank:
    """One rank's part."""

    def __init__(self, strategy: Strategy, world: World, recipe: Recipe) -> None:
        self.strategy, self.world = strategy, world
        module = MODELS[strategy.framework]
        model, loss = (registry.resolve(f"{module}:{name}") for name in ("ToyModel", "toy_loss"))
        self.role = Role(model=model, losses={"loss": loss}, optimizer=OPTIMIZER, initial=initial_value)
        self.feed = Feed(
            ToySource(),
            seed=SEED,
            global_batch=GLOBAL_BATCH,
            micro_batch=MICRO_BATCH,
            rank=world.rank,
            size=world.size,
            place=strategy.place,
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

    def resume(self, folder: Path) -> dict[str, Any]:
        """Load every checkpoint in turn, look at what the engine then holds, and go on."""
        found = {}
        for name, reader in _checkpoints(folder):
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


if __name__ == "__main__":
    main()
