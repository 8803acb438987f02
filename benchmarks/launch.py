"""How long from the command to the end of the first optimizer step on two ranks? Against torchrun, side by side.

    python benchmarks/launch.py [--rounds N] [--json FILE] [--markdown FILE]

Also `--help` of the commands, and what ours imports for it. The files are warm in the page cache for everybody. Exits
with 1 where a goal that no other load on the machine can move is missed; times are shown and judged by eye.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from report import Machine, facts_in_words, ratio, table, write

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
RANKS = 2
FIRST_STEP_GOAL, HELP_GOAL_SECONDS = 0.6, 0.2
OURS, WORKER_BY_TORCHRUN = "unitrain launch", "torchrun -m unitrain.worker"
HEAVY = ("torch", "numpy", "omegaconf", "yaml", "rich", "jax", "tensorflow", "ray")
TIMEOUT_SECONDS = 120
RECIPE = f"""\
trainer: {HERE / "first_step.py"}:FirstStep
optimizer: {{lr: 1e-3, clip: 1.0}}
train: {{steps: 1, global_batch: 8, log_every: 1, eval_every: 0}}
strategy: {{name: ddp}}
launcher: {{name: local, nproc: {RANKS}}}
checkpoint: {{every: 0}}
"""
# The modules that a command for people imports before it prints its help.
COUNT_MODULES = """\
import sys
from unitrain.cli import app
try:
    app(["--help"])
except SystemExit as end:
    assert not end.code
print(len(sys.modules), *(name for name in sys.modules if "." not in name), file=sys.stderr)
"""


Run = Mapping[str, float]  # seconds to the first step and to the end, CPU seconds of all processes, the loss


def main() -> int:
    """Measure, print; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    known = parser.parse_args()

    machine = Machine()
    first_steps = _first_steps(known.rounds)
    helps = _helps(known.rounds)
    modules, heavy = _imported()
    facts = {**machine.facts(), "rounds": known.rounds}
    missed = _missed(first_steps, heavy)
    text = (
        f"{facts_in_words(facts)}- rounds: {known.rounds}\n\n"
        f"Command to the end of the first step, {RANKS} ranks, gloo, DDP (medians, seconds):\n\n"
        f"{_first_table(first_steps)}\n"
        f"`--help` (medians, seconds):\n\n{_help_table(helps)}\n"
        f"`unitrain --help` imports {modules} modules; of {', '.join(HEAVY)}: {', '.join(heavy) or 'none'}.\n\n"
        f"{_verdict(first_steps, helps, missed)}"
    )
    print(text, end="")
    if known.json:
        found = {"first_steps": first_steps, "helps": helps, "modules": modules, "heavy": heavy, "missed": missed}
        write(known.json, {"facts": facts, **found})
    if known.markdown:
        write(known.markdown, f"# From the command to the first step\n\n{text}")
    return 1 if missed else 0


def _first_steps(rounds: int) -> dict[str, list[Run]]:
    """Name -> what each round took."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch, "recipe.yaml")
        recipe.write_text(RECIPE)
        starts: dict[str, Callable[[Path], list[list[str]]]] = {
            OURS: lambda folder: [[_command("unitrain"), "launch", str(recipe), "--run-dir", str(folder)]],
            WORKER_BY_TORCHRUN: lambda folder: [
                [*_torchrun(), "-m", "unitrain.worker", str(recipe), "--run-dir", str(folder)]
            ],
            "torchrun by_hand.py": lambda folder: [[*_torchrun(), str(HERE / "by_hand.py"), str(folder)]],
            "by_hand.py, no launcher": lambda folder: _ranks([sys.executable, str(HERE / "by_hand.py"), str(folder)]),
        }
        found: dict[str, list[Run]] = {name: [] for name in starts}
        for number in range(-1, rounds):  # the first round fills the caches and is not counted
            for name in starts if number % 2 else reversed(starts):
                folder = Path(scratch, f"{number}-{name.replace(' ', '-')}")
                folder.mkdir()
                times = _timed(starts[name](folder), folder)
                if number >= 0:
                    found[name].append(times)
    return found


def _timed(commands: Sequence[Sequence[str]], folder: Path) -> Run:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    before, began = _cpu_seconds(), time.time()
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    running = [
        subprocess.Popen(command, env=environ, cwd=folder, stdout=pipe, stderr=both, text=True) for command in commands
    ]
    for process in running:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode} of {' '.join(commands[0])}:\n{output}")
    end = time.time()
    step = json.loads((folder / "first-step.json").read_text())
    assert step["ranks"] == RANKS, "some launchers silently start one process"
    return {
        "first_step_seconds": step["time"] - began,
        "end_seconds": end - began,
        "cpu_seconds": _cpu_seconds() - before,
        "loss": step["loss"],
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _torchrun() -> list[str]:
    return [_command("torchrun"), "--nproc-per-node", str(RANKS), "--master-port", str(_free_port())]


def _ranks(argv: list[str]) -> list[list[str]]:
    place = [f"WORLD_SIZE={RANKS}", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={_free_port()}"]
    return [["env", f"RANK={rank}", *place, *argv] for rank in range(RANKS)]


def _free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        return port


def _helps(rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of each round."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "unitrain --help": [_command("unitrain"), "--help"],
        "torchrun --help": [_command("torchrun"), "--help"],
    }
    if shutil.which("accelerate", path=str(BIN)):
        commands["accelerate --help"] = [_command("accelerate"), "--help"]
    found: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(-1, rounds):
        for name in commands if number % 2 else reversed(commands):
            began = time.perf_counter()
            subprocess.run(commands[name], stdout=subprocess.DEVNULL, check=True, timeout=TIMEOUT_SECONDS)
            if number >= 0:
                found[name].append(time.perf_counter() - began)
    return found


def _command(name: str) -> str:
    return str(BIN / name)


def _imported() -> tuple[int, list[str]]:
    """How many modules our help imports, and which heavy ones."""
    argv = [sys.executable, "-c", COUNT_MODULES]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS)
    count, *names = done.stderr.split()
    return int(count), [name for name in HEAVY if name in names]


def _missed(first_steps: Mapping[str, Sequence[Run]], heavy: Sequence[str]) -> list[str]:
    found = [f"unitrain --help imports {name}" for name in heavy]
    losses = {run["loss"] for name in (OURS, WORKER_BY_TORCHRUN) for run in first_steps[name]}
    if len(losses) > 1:
        found.append(f"the first step's loss is not always the same: {sorted(losses)}")
    return found


def _column(runs: Sequence[Run], name: str) -> list[float]:
    return [run[name] for run in runs]


def _first_table(found: Mapping[str, Sequence[Run]]) -> str:
    reference = _column(found[WORKER_BY_TORCHRUN], "first_step_seconds")
    cpu = _column(found[WORKER_BY_TORCHRUN], "cpu_seconds")
    rows = []
    for name, runs in found.items():
        first, cpu_seconds = _column(runs, "first_step_seconds"), _column(runs, "cpu_seconds")
        middle, low, high = ratio(first, reference)
        rows.append([
            name,
            f"{statistics.median(first):.2f}",
            f"{middle:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{statistics.median(_column(runs, 'end_seconds')):.2f}",
            f"{statistics.median(cpu_seconds):.2f}",
            f"{ratio(cpu_seconds, cpu)[0]:.2f}",
        ])  # fmt: skip
    return table(["command", "first step", "ratio", "95 %", "end", "CPU", "CPU ratio"], rows)


def _help_table(found: Mapping[str, Sequence[float]]) -> str:
    ours = found["unitrain --help"]
    rows = [
        [name, f"{statistics.median(times):.3f}", f"{min(times):.3f}", f"{ratio(times, ours)[0]:.2f}"]
        for name, times in found.items()
    ]
    return table(["command", "median", "least", "times ours"], rows)


def _verdict(
    first_steps: Mapping[str, Sequence[Run]], helps: Mapping[str, Sequence[float]], missed: Sequence[str]
) -> str:
    seconds = {name: _column(runs, "first_step_seconds") for name, runs in first_steps.items()}
    first = ratio(seconds[OURS], seconds[WORKER_BY_TORCHRUN])[0]
    least = min(helps["unitrain --help"])
    lines = [
        f"- first step {first:.2f} x torchrun on the same script, goal at most {FIRST_STEP_GOAL}",
        f"- unitrain --help {least:.3f} s at best, goal below {HELP_GOAL_SECONDS}",
        *(f"- MISSED: {problem}" for problem in missed),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
