"""How long from kill -9 of a rank to the next step, and how often does a run recover? Against torchrun, side by side.

    python benchmarks/recovery.py [--rounds N] [--json FILE] [--markdown FILE]

Two ranks train under DDP on gloo and save often; in the middle rank 1 is killed. One script is ours (the same recipe
under `unitrain launch` and under `torchrun --max-restarts`), the other is plain torch that saves after every step.
The clock runs from the kill to the end of the first step that any restarted rank reports. A run has recovered when
it ends with exit code 0 and all its steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import Machine, facts_in_words, table, write

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
RANKS, STEPS, EVERY, KILL_AFTER = 2, 60, 10, 25
GOAL_RATIO, GOAL_SECONDS = 0.2, 1.0
OURS, WORKER_BY_TORCHRUN, PLAIN = "unitrain launch", "torchrun -m unitrain.worker", "torchrun, plain DDP"
TIMEOUT_SECONDS = 90
RECIPE = f"""\
trainer: {HERE / "recovering.py"}:Recovering
optimizer: {{lr: 1e-3, clip: 1.0}}
train: {{steps: {STEPS}, global_batch: 8, log_every: 1, eval_every: 0}}
strategy: {{name: ddp}}
launcher: {{name: local, nproc: {RANKS}}}
checkpoint: {{every: {EVERY}}}
"""

Trial = Mapping[str, Any]  # seconds (None: no further step), recovered, exit_code, redone (steps)


def main() -> int:
    """Measure, print; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    known = parser.parse_args()

    machine = Machine()
    trials = _trials(known.rounds)
    facts = {**machine.facts(), "rounds": known.rounds}
    missed = _missed(trials)
    text = (
        f"{facts_in_words(facts)}- rounds: {known.rounds}\n\n"
        f"kill -9 of rank 1 of {RANKS} (gloo, DDP) after step {KILL_AFTER} of {STEPS}, to the end of the next step:\n\n"
        f"{_table(trials)}\n{_verdict(trials, missed)}"
    )
    print(text, end="")
    if known.json:
        write(known.json, {"facts": facts, "trials": trials, "missed": missed})
    if known.markdown:
        write(known.markdown, f"# From kill -9 to the next step\n\n{text}")
    return 1 if missed else 0


def _trials(rounds: int) -> dict[str, list[Trial]]:
    """Name -> what each round found; the rounds of all are interleaved."""
    found: dict[str, list[Trial]] = {OURS: [], WORKER_BY_TORCHRUN: [], PLAIN: []}
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch, "recipe.yaml")
        recipe.write_text(RECIPE)
        for number in range(rounds):
            for name in found if number % 2 else reversed(found):
                folder = Path(scratch, f"{number}-{name.replace(' ', '-')}")
                folder.mkdir()
                found[name].append(_trial(_command(name, recipe, folder), folder))
                print(f"{name}: {found[name][-1]}", file=sys.stderr)
    return found


def _command(name: str, recipe: Path, folder: Path) -> list[str]:
    run = str(folder / "run")
    if name == OURS:
        return [str(BIN / "unitrain"), "launch", str(recipe), "--run-dir", run]
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "3"]
    if name == WORKER_BY_TORCHRUN:
        return [*torchrun, "-m", "unitrain.worker", str(recipe), "--run-dir", run]
    return [*torchrun, str(HERE / "recovering.py"), str(STEPS)]


def _trial(command: Sequence[str], folder: Path) -> Trial:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "STEPS_FOLDER": str(folder)}
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command, env=environ, cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(steps := _steps(folder)) < KILL_AFTER and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        if not steps or process.poll() is not None:
            raise SystemExit(f"{' '.join(command)} did not come to the kill:\n{(folder / 'output.txt').read_text()}")
        killed = _steps(folder, rank=1)[-1]["pid"]
        os.kill(killed, signal.SIGKILL)
        at = time.time()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=TIMEOUT_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    pids = {step["pid"] for step in _steps(folder) if step["time"] < at}
    after = [step for step in _steps(folder) if step["pid"] not in pids]
    before = [step for step in _steps(folder) if step["pid"] in pids]
    recovered = process.returncode == 0 and bool(after) and after[-1]["step"] == STEPS
    return {
        "seconds": round(after[0]["time"] - at, 3) if after else None,
        "recovered": recovered,
        "exit_code": process.returncode,
        "redone": before[-1]["step"] - after[0]["step"] + 1 if after else None,
    }


def _steps(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What a rank has written at the end of each step."""
    path = folder / f"steps-{rank}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _seconds(trials: Sequence[Trial]) -> list[float]:
    return [trial["seconds"] for trial in trials if trial["recovered"]]


def _median(trials: Sequence[Trial]) -> float:
    """Of the runs that recovered; infinite where none did."""
    seconds = _seconds(trials)
    return statistics.median(seconds) if seconds else float("inf")


def _table(found: Mapping[str, Sequence[Trial]]) -> str:
    rows = []
    for name, trials in found.items():
        seconds = _seconds(trials)
        spread = [f"{value(seconds):.2f}" for value in (statistics.median, min, max)] if seconds else ["-"] * 3
        redone = [trial["redone"] for trial in trials if trial["recovered"]]
        recovered = sum(trial["recovered"] for trial in trials)
        rows.append([
            name,
            f"{recovered} of {len(trials)}",
            *spread,
            f"{_median(found[OURS]) / _median(trials):.2f}" if seconds else "-",
            f"{statistics.median(redone):g}" if redone else "-",
        ])  # fmt: skip
    return table(["command", "recovered", "median s", "least", "most", "ours / it", "steps redone"], rows)


def _missed(found: Mapping[str, Sequence[Trial]]) -> list[str]:
    ours = found[OURS]
    missed = [f"run {number} of ours did not recover" for number, trial in enumerate(ours) if not trial["recovered"]]
    if _median(ours) > GOAL_RATIO * _median(found[WORKER_BY_TORCHRUN]):
        missed.append(f"more than {GOAL_RATIO} x torchrun")
    return missed


def _verdict(found: Mapping[str, Sequence[Trial]], missed: Sequence[str]) -> str:
    ours, theirs = _median(found[OURS]), _median(found[WORKER_BY_TORCHRUN])
    lines = [
        f"- {ours:.2f} s, goal about {GOAL_SECONDS:g} s",
        f"- {ours / theirs:.2f} x torchrun on the same script, goal at most {GOAL_RATIO}",
        *(f"- MISSED: {problem}" for problem in missed),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
