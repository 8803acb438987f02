"""Where do the seconds of an RL step go, and what does generating ahead save? By phase, beside the bound.

    python benchmarks/rl.py [--quick] [--rounds N] [--json FILE] [--markdown FILE]

Every round runs all modes one after the other, each as a new run whose first steps are not counted; a figure is the
median over rounds of a round's median step. Exits with 1 where modes that must draw the same samples do not: seconds
are shown and judged by eye. Needs Ray for all but the first table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from report import Machine, facts_in_words, ratio, table, write

from unitrain.recipe_file import recipe_from_text
from unitrain.run import Run
from unitrain.trainer_path import resolve_trainer

PHASES = ("generate", "reward", "sync", "logprobs", "update")
STEPS, SKIPPED = 10, 3  # of a run; the first ones warm up, and a pool starts
RECIPE = """\
name: rl-benchmark
trainer: unitrain.rl:GRPO
model: {name: gpt, layers: 4, width: 128, heads: 4, ffn: 344, tied: false, max_len: 32}
data: {name: records, path: "unitrain.rl.examples:addition", seq_len: 10}
optimizer: {lr: 1e-4, clip: 1.0}
strategy: {name: single}
train: {steps: 10, global_batch: 32, seed: 1, log_every: 1, eval_every: 0}
rl:
  samples_per_prompt: 8
  sampling: {max_tokens: 8}
  reward: {function: "unitrain.rl.examples:vowels"}
checkpoint: {every: 0}
"""
PPO = ("trainer=unitrain.rl:PPO", "train.global_batch=256", "rl.samples_per_prompt=1", "rl.critic.lr=1e-4")
# Long answers, few of them, no reference: generating and training then take about as long.
LEAN = ("rl.kl.where=none", "train.global_batch=4", "rl.sampling.max_tokens=24")
POOL = ("rl.rollout.actors=1", "rl.rollout.cpus=1", "rl.rollout.prompts_per_call=8")
SIZES = {"0.8 M": (4, 128, 344), "3.2 M": (4, 256, 688), "12.6 M": (4, 512, 1376)}


def main() -> int:
    """Run, print the tables; 1 where samples differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="times that every mode is run")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    known = parser.parse_args()
    rounds = min(known.rounds, 2) if known.quick else known.rounds
    machine = Machine()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        modes: dict[str, Sequence[str]] = {"GRPO": (), "PPO": PPO, "long answers": LEAN}
        sizes: dict[str, Sequence[str]] = {}
        if importlib.util.find_spec("ray") is None:
            print("note: Ray is not installed: nothing is said of pools", file=sys.stderr)
        else:
            pool = (*LEAN, *POOL, f"rl.rollout.address={stack.enter_context(_cluster())}")
            modes |= {"same, pool": pool, "same, pool ahead": (*pool, "rl.max_staleness=1")}
            for name, (layers, width, ffn) in SIZES.items():
                model = f"model={{name: gpt, layers: {layers}, width: {width}, heads: 4, ffn: {ffn}, tied: false}}"
                sizes[name] = (*pool, model, "train.global_batch=2", f"train.steps={SKIPPED + 3}")
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*modes, *sizes)}
        for number in range(rounds):
            for name, overrides in (modes | sizes).items():
                found[name].append(measured(scratch / f"{number}-{name}".replace(" ", "-"), overrides))
                print(f"round {number + 1} of {rounds}: {name}, {found[name][-1]['step']:.3f} s a step", flush=True)
    missed = problems(found)
    facts = {**machine.facts(), "rounds": rounds}
    text = in_words(facts, found, missed)
    print(f"\n{text}")
    if known.json:
        write(known.json, {"facts": facts, "found": found, "missed": missed})
    if known.markdown:
        write(known.markdown, f"# The seconds of RL, CPU\n\n{text}\n")
    return 1 if missed else 0


def in_words(facts: dict[str, Any], found: Mapping[str, Sequence[Mapping[str, Any]]], missed: Sequence[str]) -> str:
    """The page."""
    sizes = {name: rounds for name, rounds in found.items() if name in SIZES}
    parts = [phases({name: rounds for name, rounds in found.items() if name not in SIZES})]
    if sizes:
        parts += [overlap(found), sync(sizes)]
    verdict = "; ".join(missed) or "The modes that must draw the same samples did, to the bit."
    what = f"- rounds: {facts['rounds']}, {STEPS - SKIPPED} steps each\n\n"
    return facts_in_words(facts) + what + "\n".join([*parts, verdict])


@contextlib.contextmanager
def _cluster() -> Iterator[str]:
    """The address of a private Ray that all runs share, so that none pays for its start."""
    from unitrain.actors.cluster_ray import private_or_running

    with private_or_running(None, cpus=4, name="benchmark", object_store_bytes=200 << 20) as found:
        yield found.address


def measured(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Medians over the counted steps of a run: of the step, and of each phase; what it drew, and its weights."""
    recipe = recipe_from_text(RECIPE, overrides=overrides)
    trainer: Any = resolve_trainer(recipe.trainer)(recipe, run_dir=folder)
    ends: list[float] = []
    seconds: list[Mapping[str, float]] = []
    size = 0
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in trainer.steps():
            ends.append(time.perf_counter())
            seconds.append(dict(trainer.seconds))
            size = size or trainer.engines["model"].call(_bytes)
    steps = [after - before for before, after in itertools.pairwise(ends)][SKIPPED - 1 :]
    records = [record for record in Run(folder).metrics() if record["split"] == "train"]
    return {
        "step": statistics.median(steps),
        **{phase: _median(seconds[SKIPPED:], phase) for phase in (*PHASES, "generating")},
        "drawn": [[record[name] for name in ("reward", "length", "loss")] for record in records],
        "bytes": size,
    }


def _bytes(model: Any) -> int:
    return sum(each.numel() * each.element_size() for each in model.parameters())


def _median(seconds: Sequence[Mapping[str, float]], phase: str) -> float:
    return statistics.median(each.get(phase, 0.0) for each in seconds)


def problems(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Where a pool of synchronous actors is not what the policy's own rank is; where a round is not the first one."""
    missed = [
        f"{name} did not repeat itself"
        for name, rounds in found.items()
        if any(each["drawn"] != rounds[0]["drawn"] for each in rounds)
    ]
    if "same, pool" in found and found["same, pool"][0]["drawn"] != found["long answers"][0]["drawn"]:
        missed.append("a synchronous pool drew other samples than the policy's own rank")
    return missed


def _over(rounds: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.median(each[name] for each in rounds)


def phases(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Seconds of a step by phase."""
    head = ("what", "step s", *(f"{phase} s" for phase in PHASES), "other s")
    rows = []
    for name, rounds in found.items():
        parts = [_over(rounds, phase) for phase in PHASES]
        step = _over(rounds, "step")
        rows.append([name, *(f"{value:.3f}" for value in (step, *parts, max(step - sum(parts), 0.0)))])
    return table(head, rows)


def overlap(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What generating one step ahead saves, beside what it could save at most."""
    waiting, ahead = found["same, pool"], found["same, pool ahead"]
    # Loading weights in the actor is waited for too, and overlaps too; gathering them is the trainer's own work.
    pairs = zip(waiting, ahead, strict=True)
    share = statistics.median((one["generate"] + max(one["sync"] - two["sync"], 0)) / one["step"] for one, two in pairs)
    bound = 1 / max(share, 1 - share)
    middle, low, high = ratio([each["step"] for each in waiting], [each["step"] for each in ahead])
    waited = _over(ahead, "generate")
    head = (
        "f: share waited for the pool",
        "bound 1/max(f, 1-f)",
        "speed-up",
        "95 %",
        "share of the bound",
        "still waited s",
    )
    reached = (middle - 1) / (bound - 1) if bound > 1 else 0.0
    cells = [
        f"{share:.2f}",
        f"{bound:.2f}",
        f"{middle:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{reached:.0%}",
        f"{waited:.3f}",
    ]
    return table(head, [cells])


def sync(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Seconds from the last update until an actor holds the weights, verified by their hash."""
    head = ("parameters", "MB", "sync s", "s per MB")
    rows = []
    for name, rounds in found.items():
        size, seconds = rounds[0]["bytes"] / 1e6, _over(rounds, "sync")
        rows.append([name, f"{size:.1f}", f"{seconds:.4f}", f"{seconds / size:.4f}"])
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
