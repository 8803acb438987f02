"""How integration tests start runs, as users do, and read what these leave in their folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unitrain.recipe_file import recipe_from_text
from unitrain.run import Run
from unitrain.trainer import Result, Trainer
from unitrain.trainer_path import resolve_trainer

COMMAND = Path(sys.executable).with_name("unitrain")
TRAINERS = Path(__file__).with_name("trainers.py")
TIMEOUT_SECONDS = 600

ROWS = f"""\
name: rows
trainer: {TRAINERS}:Rows
optimizer: {{lr: 1e-2, weight_decay: 0.1, clip: 1.0}}
schedule: {{name: cosine, warmup_steps: 3}}
train: {{steps: 20, global_batch: 10, micro_batch: 2, log_every: 1, eval_every: 10}}
checkpoint: {{every: 10}}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last words on the terminal, of errors where there are any."""
        return (self.err.strip() or self.out.strip()).splitlines()[-1]

    def succeeded(self) -> Ended:
        """The same, or an assertion with all that was said."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}{self.err}"
        return self


def trainer(name: str) -> str:
    """The override that chooses another of our Trainers."""
    return f"trainer={TRAINERS}:{name}"


def unitrain(*arguments: str | Path, cwd: Path, **environ: str) -> Ended:
    """Run the command and wait for its end."""
    return run([COMMAND, *arguments], cwd=cwd, **environ)


def run(command: Sequence[str | Path], *, cwd: Path, **environ: str) -> Ended:
    """Run any command with one thread a rank, and wait for its end."""
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def launch(recipe: str, folder: Path, shape: str, *overrides: str) -> Ended:
    """Launch a recipe's text on a shape such as `ddp-2` (two ranks of ddp), with `folder` as the run's own."""
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(recipe)
    return unitrain("launch", path, *_flags(shape), "--run-dir", folder, *overrides, cwd=folder.parent)


def resume(folder: Path, shape: str, *overrides: str) -> Ended:
    """Resume a run on a shape such as `fsdp2-3`."""
    return unitrain("resume", folder, *_flags(shape), *overrides, cwd=folder.parent)


def fit(recipe: str, folder: Path, *overrides: str, strategy: str = "single") -> Result:
    """Train on one rank, in this very process; goes on where the folder holds a checkpoint."""
    return fit_by(None, recipe, folder, *overrides, strategy=strategy)


def fit_by(
    trainer: type[Trainer] | None, recipe: str, folder: Path, *overrides: str, strategy: str = "single"
) -> Result:
    """The same with a trainer of the test's own; None: the recipe's."""
    loaded = recipe_from_text(recipe, overrides=[f"strategy={{name: {strategy}}}", *overrides])
    return (trainer or resolve_trainer(loaded.trainer))(loaded, run_dir=folder).fit()


def curve(recipe: str, folder: Path, shape: str, *overrides: str) -> list[float]:
    """The loss of every step on a shape such as `ddp-2`; one rank trains in this process."""
    strategy, _, ranks = shape.rpartition("-")
    if ranks == "1":
        fit(recipe, folder, *overrides, strategy=strategy)
    else:
        launch(recipe, folder, shape, *overrides).succeeded()
    return losses(folder)


def fit_together(shape: str, folders: Sequence[Path]) -> None:
    """Train the runs in these folders, one after the other, by one group of processes under torchrun."""
    strategy, _, ranks = shape.rpartition("-")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    run([*torchrun, TRAINERS, strategy, *folders], cwd=folders[0].parent).succeeded()


def copied(folder: Path, to: Path, *, up_to: int) -> Path:
    """A copy of a run as it was when the checkpoint of step `up_to` was its newest."""
    shutil.copytree(folder, to)
    for found in (to / "checkpoints").glob("s*"):
        if int(found.name[1:9]) > up_to:
            shutil.rmtree(found)
    return to


def metrics(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The records of a split."""
    return [record for record in Run(folder).metrics() if record["split"] == split]


def losses(folder: Path) -> list[float]:
    """The training loss of every step, each of which must be there once."""
    records = metrics(folder)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def events(folder: Path, *names: str) -> list[dict[str, Any]]:
    """The events of those names, all without."""
    return [event for event in Run(folder).events() if not names or event["event"] in names]


def checkpoints(folder: Path, root: Path | None = None) -> list[Path]:
    """The folders of a run's published checkpoints, by step; `root` where they lie elsewhere."""
    return sorted(path.parent for path in (root or folder / "checkpoints").glob("*/MANIFEST.json"))


def samples(folder: Path) -> list[list[int]]:
    """What each step of the final run trained on, over its ranks in order (see trainers.Witness).

    A rank that goes back to an earlier step takes the later ones back; every attempt at a step must see the same.
    """
    whole: dict[int, list[int]] = {}
    for path in sorted(folder.glob("samples-*.jsonl")):
        steps: dict[int, list[int]] = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            step, ids = record["step"], record["ids"]
            assert step <= len(steps) + 1, f"{path.name} goes from step {len(steps)} to {step}"
            assert steps.get(step, ids) == ids, f"{path.name} has other samples in step {step} than before"
            steps = {number: seen for number, seen in steps.items() if number < step} | {step: ids}
        for step, ids in steps.items():
            whole.setdefault(step, []).extend(ids)
    return [whole[step] for step in range(1, len(whole) + 1)]


def damage(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of two curves of the same length."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def _flags(shape: str) -> list[str]:
    strategy, _, ranks = shape.rpartition("-")
    return ["--strategy", strategy, "--nproc", ranks]
