"""`unitrain verify` as its users meet it: real runs side by side, and every way in which one can miss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from unitrain.run import Run
from unitrain.verify.plan import BAND, TIGHT

sys.path.insert(0, str(Path(__file__).parent))
from runs import COMMAND, unitrain

HERE = Path(__file__).parent
MUTANTS = HERE.parent / "contract"
STEPS = 20
RECIPE = f"""\
name: rows
trainer: {HERE / "trainers.py"}:Rows
optimizer: {{lr: 1e-2, weight_decay: 0.1, clip: 1.0}}
schedule: {{name: cosine, warmup_steps: 3}}
train: {{steps: 400, global_batch: 10, micro_batch: 2}}
strategy: {{name: fsdp2, options: {{reshard_after_forward: false}}}}
"""
BROKEN = f"""\
import importlib.util
spec = importlib.util.spec_from_file_location("trainers", {str(HERE / "trainers.py")!r})
trainers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainers)


class Broken(trainers.Rows):
    def step(self, batch):
        if self.recipe.strategy.name == "BAD" and batch.step == 3:
            raise RuntimeError("the fuse has blown\\nand this is its second line")
        return super().step(batch)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.yaml").write_text(RECIPE)
    return tmp_path


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "verify.json").read_text())
    return found


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["strategy"]: row for row in report(folder)["rows"]}


def test_sound_strategies_agree_and_everything_is_left_for_the_reader(folder):
    done = unitrain("verify", "rows.yaml", "--strategies", "ddp,fsdp2", "--nproc", "3", "--out", "out", cwd=folder)
    assert (done.code, done.err) == (0, ""), done.out + done.err
    assert done.out.splitlines()[-1].startswith("passed: out/verify.json")
    found = rows(folder)
    assert {name: (row["ranks"], row["verdict"]) for name, row in found.items()} == {
        "single": (1, "reference"),
        "ddp": (3, "agrees"),
        "fsdp2": (3, "agrees"),
    }
    for name in ("ddp", "fsdp2"):
        row = found[name]
        assert row["tier"]["name"] == "tight"
        assert len(row["losses"]) == len(row["loss_differences"]) == STEPS
        assert max(row["loss_differences"]) == row["loss_difference"] <= TIGHT.losses
        assert row["weights_difference"] <= TIGHT.weights
        assert row["weights_compared"] + row["weights_left_out"] == 6 * 11 + 11 + 11 + 1
        run = Run(folder / "out" / name)
        assert [record["loss"] for record in run.metrics()] == row["losses"]
        assert "step" in (run.folder / "logs" / "attempt-0" / "rank-0.log").read_text()
    options = {name: "reshard_after_forward" in Run(folder / "out" / name).recipe_path.read_text() for name in found}
    assert options == {"single": False, "ddp": False, "fsdp2": True}
    if (folder / "out" / "verify.png").exists():
        assert (folder / "out" / "verify.png").stat().st_size > 10_000
    again = unitrain("verify", "rows.yaml", "--strategies", "ddp", "--out", "out", cwd=folder)
    assert again.code == 78
    assert again.err == "error: out is not an empty folder; name another with --out\n"


def test_a_strategy_that_computes_something_else_is_found_out_even_in_the_band(folder):
    wrong = ["mutants:MeanOfMeans", "mutants:NoGradientSync"]
    done = unitrain(
        "verify", "rows.yaml", "--strategies", ",".join(["ddp", *wrong]), "--out", "out", "--precision", "bf16",
        cwd=folder, PYTHONPATH=str(MUTANTS),
    )  # fmt: skip
    assert done.code == 70, done.out + done.err
    assert done.out.splitlines()[-1].startswith("failed: out/verify.json")
    found = rows(folder)
    assert found["ddp"]["verdict"] == "agrees"
    for name in wrong:
        assert found[name]["verdict"] == "losses differ", name
        assert found[name]["loss_difference"] > BAND.losses
        first = found[name]["first_step_beyond"]
        assert found[name]["loss_differences"][first - 1] > BAND.losses
        assert all(far <= BAND.losses for far in found[name]["loss_differences"][: first - 1])


def test_a_run_that_fails_is_a_row_with_its_error_and_the_others_go_on(folder):
    (folder / "broken.py").write_text(BROKEN.replace("BAD", "ddp"))
    done = unitrain(
        "verify", "rows.yaml", "--strategies", "ddp,fsdp2", "--out", "out", "trainer=broken.py:Broken", cwd=folder
    )
    assert done.code == 70
    found = rows(folder)
    assert found["ddp"]["verdict"] == "failed: RuntimeError: the fuse has blown"
    assert len(found["ddp"]["losses"]) == 3
    assert found["fsdp2"]["verdict"] == "agrees"
    assert "failed: RuntimeError: the fuse has blown" in done.out
    assert "second line" in (folder / "out" / "ddp" / "logs" / "agent.log").read_text()


def test_without_a_sound_reference_nothing_else_is_started(folder):
    (folder / "broken.py").write_text(BROKEN.replace("BAD", "single"))
    done = unitrain(
        "verify", "rows.yaml", "--strategies", "ddp", "--out", "out", "trainer=broken.py:Broken", cwd=folder
    )
    assert done.code == 70
    assert list(rows(folder)) == ["single"]
    assert not (folder / "out" / "ddp").exists()


def test_an_interrupted_verification_leaves_no_process_behind(folder):
    slow = ["train.global_batch=200", "train.micro_batch=1", "--steps", "100000"]
    verifying = subprocess.Popen(
        [COMMAND, "verify", "rows.yaml", "--strategies", "ddp", "--out", "out", *slow],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    agent = folder / "out" / "single" / "agent.json"
    deadline = time.monotonic() + 60
    while not (folder / "out" / "single" / "metrics.jsonl").exists():
        assert verifying.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    record = json.loads(agent.read_text())
    verifying.send_signal(signal.SIGINT)
    assert verifying.wait(60) == 130
    for pid in (record["process"]["pid"], *record["ranks"].values()):
        assert not Path(f"/proc/{pid}").exists()


def test_a_request_that_cannot_be_met_starts_nothing(folder):
    for arguments, message in {
        ("--strategies", "ddq"): "error: no strategy named 'ddq', did you mean 'ddp'?",
        ("--nproc", "11"): "error: 11 ranks cannot share a batch of 10 samples",
        ("--strategies", "single"): "error: there is nothing to compare with 'single'",
    }.items():
        done = unitrain("verify", "rows.yaml", "--out", "out", *arguments, cwd=folder)
        assert (done.code, done.out) == (78, "")
        assert done.err.startswith(message)
        assert not (folder / "out").exists()
