"""What does a Trainer add to a compiled step? Against a step written by hand in JAX and in TensorFlow, side by side.

    python benchmarks/frameworks.py [--frameworks jax tensorflow] [--rounds N] [--json FILE] [--markdown FILE]

One process, the same model (a GPT of 4 blocks), data order, first weights, AdamW and clipping. Exits with 1 where the
losses of the first steps differ, which makes a row void. Times are shown and judged by eye: at most 1.03.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report import Machine, facts_in_words, ratio, table, write

from unitrain import ArraySource, Source, Trainer, registry
from unitrain.data.feed import Feed
from unitrain.models.config import GPT
from unitrain.recipe import CheckpointRecipe, OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe

HERE = Path(__file__).parent
HAND, OURS = "by hand", "unitrain"
GOAL, SAME_LOSSES = 1.03, 1e-5  # ratio of wall times; relative difference of losses
SEED, LR, BETAS, EPS, CLIP = 0, 1e-3, (0.9, 0.999), 1e-8, 1.0
CONFIG = GPT(layers=4, width=128, heads=4, ffn=512, vocab_size=256, max_len=64)
ROWS, BLOCK = 4, 4  # of a batch; steps of one timed block
CHECKED_STEPS = 20
ENDLESS = 10**9  # steps; a loop is left before it comes to its last, which is logged and saved


def main() -> int:
    """Run each framework in a process of its own, print the table; 1 where losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="+", choices=tuple(HAND_WRITTEN), default=tuple(HAND_WRITTEN))
    parser.add_argument("--rounds", type=int, default=100, help="rounds of timed blocks, each loop twice a round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.measure:
        print(json.dumps(measure(known.measure, known.rounds)))
        return 0
    machine = Machine()
    rows = [row for framework in known.frameworks for row in run_case(framework, known.rounds)]
    facts = {**machine.facts(), "rounds": known.rounds}
    missed = [f"{row['framework']}: the losses differ by {row['far']:.1e}" for row in rows if row["far"] > SAME_LOSSES]
    verdict = "".join(f"- void: {problem}\n" for problem in missed) or f"Same losses. Goal: a wall ratio of {GOAL}.\n"
    text = (
        f"{facts_in_words(facts)}- model: GPT of {CONFIG.num_parameters():,} parameters, {ROWS} x 64 tokens, fp32, one "
        f"process; {known.rounds} rounds\n\n{_table(rows)}\n{verdict}"
    )
    print(text, end="")
    if known.json:
        write(known.json, {"facts": facts, "rows": rows, "missed": missed})
    if known.markdown:
        write(known.markdown, f"# The cost of a compiled step, CPU\n\n{text}")
    return 1 if missed else 0


def run_case(framework: str, rounds: int) -> list[dict[str, Any]]:
    """Both loops of a framework, from one process."""
    command = [sys.executable, __file__, "--measure", framework, "--rounds", str(rounds)]
    environ = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=1200, check=False
    )
    if done.returncode:
        raise SystemExit(f"{framework} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    by_hand = found[HAND]
    return [
        {
            "framework": framework,
            "loop": name,
            "far": max(abs(a - b) / abs(b) for a, b in zip(mine["losses"], by_hand["losses"], strict=True)),
            "cpu_milliseconds": 1e3 * statistics.median(mine["cpu"]),
            "wall_milliseconds": 1e3 * statistics.median(mine["wall"]),
            "cpu_ratio": ratio(mine["cpu"], by_hand["cpu"]),
            "wall_ratio": ratio(mine["wall"], by_hand["wall"]),
        }
        for name, mine in found.items()
    ]


def measure(framework: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Losses of the first steps, and (CPU, wall) seconds a step of each round; loops take turns."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        printed, sys.stdout = sys.stdout, nothing  # what a Trainer says is not ours to time
        try:
            loops: dict[str, Loop] = {OURS: Ours(framework, Path(folder) / "run")}  # first: it sets the framework up
            loops[HAND] = HAND_WRITTEN[framework]()
            found = {
                name: {"losses": loop.advance(CHECKED_STEPS), "cpu": [], "wall": []} for name, loop in loops.items()
            }
            gc.collect()
            gc.freeze()
            for _ in range(rounds):
                totals = {name: [0.0, 0.0] for name in loops}
                for name in (*loops, *reversed(list(loops))):
                    cpu, wall = time.process_time(), time.perf_counter()
                    loops[name].advance(BLOCK)
                    totals[name][0] += (time.process_time() - cpu) / (2 * BLOCK)
                    totals[name][1] += (time.perf_counter() - wall) / (2 * BLOCK)
                for name, (cpu, wall) in totals.items():
                    found[name]["cpu"].append(cpu)
                    found[name]["wall"].append(wall)
            for loop in loops.values():
                loop.close()
        finally:
            sys.stdout = printed
    return {name: found[name] for name in (HAND, OURS)}


def source() -> Source:
    """Random tokens and the tokens after them."""
    tokens = np.random.default_rng(SEED).integers(0, 256, (256, 65)).astype(np.int32)
    return ArraySource(tokens=tokens[:, :-1].copy(), targets=tokens[:, 1:].copy())


class Loop(ABC):
    """A training loop that can be run some steps at a time."""

    @abstractmethod
    def advance(self, steps: int) -> list[float]:
        """Go on by so many steps, wait for the last, and give the loss of each."""

    def close(self) -> None:
        """Give up what the loop holds."""
        return


class Ours(Loop):
    """A Trainer's own loop: `fit` does nothing but exhaust `steps`."""

    def __init__(self, framework: str, folder: Path) -> None:
        endings = {"jax": "jax", "tensorflow": "tf"}
        native = importlib.import_module(f"unitrain.tasks.language_model_{endings[framework]}")

        class Benchmark(Trainer):
            initial = staticmethod(CONFIG.initial)

            def build_model(self) -> Any:
                return registry.resolve(CONFIG.modules[framework])(CONFIG)

            def build_source(self, split: str) -> Source | None:
                return source() if split == "train" else None

            def loss(self, model: Any, batch: Any) -> Any:
                return native.loss(self, model, batch)

        recipe = Recipe(
            trainer="frameworks:Ours",
            optimizer=OptimizerRecipe(lr=LR, betas=BETAS, eps=EPS, clip=CLIP),
            train=TrainRecipe(steps=ENDLESS, global_batch=ROWS, seed=SEED, log_every=ENDLESS, eval_every=0),
            strategy=StrategyRecipe(name=framework),
            checkpoint=CheckpointRecipe(every=0),
        )
        self.steps: Any = Benchmark(recipe, run_dir=folder).steps()  # a generator: closing it ends the run

    def advance(self, steps: int) -> list[float]:
        outs = [out.loss for out in itertools.islice(self.steps, steps)]
        return [float(loss) for loss in outs]

    def close(self) -> None:
        self.steps.close()


class _ByHand(Loop):
    """A loop with batches from the same kind of feed."""

    def __init__(self, place: Any) -> None:
        self.feed = Feed(
            source(), seed=SEED, global_batch=ROWS, micro_batch=None, rank=0, size=1, place=place, even=True
        )
        self.number = 0

    def advance(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(self.step(self.feed.batch(self.number).micro()[0].arrays))
            self.number += 1
        return [float(loss) for loss in losses]

    def step(self, batch: Mapping[str, Any]) -> Any:
        """One update; its mean loss, not waited for."""
        raise NotImplementedError

    def close(self) -> None:
        self.feed.close()


class JaxByHand(_ByHand):
    """One jitted function with donated state, as JAX's own examples have it."""

    def __init__(self) -> None:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        super().__init__(lambda arrays: {name: jax.device_put(array) for name, array in arrays.items()})
        module: Any = registry.resolve(CONFIG.modules["jax"])
        graph, params, rest = nnx.split(module(CONFIG), nnx.Param, ...)
        values = {}
        for path, variable in params.flat_state():
            name, turn = module.layout.of(".".join(map(str, path)))
            shape = variable.get_value().shape
            values[path] = jnp.asarray(turn.to_native(CONFIG.initial(name, turn.canonical_shape(shape), SEED), shape))
        params = nnx.from_flat_state([(path, nnx.Param(value)) for path, value in values.items()])

        def mean_loss(params: Any, batch: Mapping[str, Any]) -> Any:
            logits = nnx.merge(graph, params, rest)(batch["tokens"])
            each = jax.nn.log_softmax(logits.astype(jnp.float32))
            return -jnp.take_along_axis(each, batch["targets"][..., None], axis=-1).mean()

        def step(state: Any, batch: Mapping[str, Any], lr: Any) -> Any:
            params, first, second, count = state
            loss, grads = jax.value_and_grad(mean_loss)(params, batch)
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))
            grads = jax.tree.map(lambda grad: grad * jnp.minimum(1.0, CLIP / (norm + 1e-6)), grads)
            count += 1
            first = jax.tree.map(lambda m, g: BETAS[0] * m + (1 - BETAS[0]) * g, first, grads)
            second = jax.tree.map(lambda v, g: BETAS[1] * v + (1 - BETAS[1]) * g * g, second, grads)
            rates = 1 - BETAS[0] ** count, 1 - BETAS[1] ** count
            params = jax.tree.map(
                lambda p, m, v: p - lr * (m / rates[0]) / (jnp.sqrt(v / rates[1]) + EPS), params, first, second
            )
            return (params, first, second, count), loss

        self.state = params, *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)), jnp.float32(0)
        self.compiled = jax.jit(step, donate_argnums=0)

    def step(self, batch: Mapping[str, Any]) -> Any:
        self.state, loss = self.compiled(self.state, batch, np.float32(LR))
        return loss


class TensorFlowByHand(_ByHand):
    """One tf.function around a tape and the optimizer's formulas."""

    def __init__(self) -> None:
        import tensorflow as tf

        super().__init__(lambda arrays: {name: tf.constant(array) for name, array in arrays.items()})
        module: Any = registry.resolve(CONFIG.modules["tensorflow"])
        model = module(CONFIG)
        variables = model.trainable_variables
        for variable in variables:
            name, turn = module.layout.of(variable.path.partition("/")[2])
            shape = tuple(variable.shape)
            variable.assign(turn.to_native(CONFIG.initial(name, turn.canonical_shape(shape), SEED), shape))
        weights = [variable.value for variable in variables]
        firsts, seconds = ([tf.Variable(tf.zeros(w.shape)) for w in weights] for _ in range(2))
        count = tf.Variable(0.0)

        @tf.function
        def step(tokens: Any, targets: Any, lr: Any) -> Any:
            with tf.GradientTape() as tape:
                logits = tf.cast(model(tokens, training=True), tf.float32)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits))
            grads = [tf.convert_to_tensor(grad) for grad in tape.gradient(loss, weights)]
            factor = tf.minimum(1.0, CLIP / (tf.linalg.global_norm(grads) + 1e-6))
            count.assign_add(1.0)
            rates = 1 - tf.pow(BETAS[0], count), 1 - tf.pow(BETAS[1], count)
            for weight, first, second, grad in zip(weights, firsts, seconds, grads, strict=True):
                scaled = grad * factor
                first.assign(BETAS[0] * first + (1 - BETAS[0]) * scaled)
                second.assign(BETAS[1] * second + (1 - BETAS[1]) * scaled * scaled)
                weight.assign_sub(lr * (first / rates[0]) / (tf.sqrt(second / rates[1]) + EPS))
            return loss

        self.compiled, self.rate = step, tf.constant(LR)

    def step(self, batch: Mapping[str, Any]) -> Any:
        return self.compiled(batch["tokens"], batch["targets"], self.rate)


HAND_WRITTEN = {"jax": JaxByHand, "tensorflow": TensorFlowByHand}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["framework", "loop", "CPU ms", "CPU ratio", "95 %", "wall ms", "wall ratio", "95 %", "losses"]
    cells = []
    for row in rows:
        line = [row["framework"], row["loop"]]
        for clock in ("cpu", "wall"):
            middle, low, high = row[f"{clock}_ratio"]
            line.append(f"{row[f'{clock}_milliseconds']:.2f}")
            line += ["1", ""] if row["loop"] == HAND else [f"{middle:.3f}", f"{low:.2f}-{high:.2f}"]
        cells.append([*line, "" if row["loop"] == HAND else f"{row['far']:.0e}"])
    return table(head, cells)


if __name__ == "__main__":
    sys.exit(main())
