"""`unitrain chaos` as its users meet it: faults of every kind survived in one drill, and a run that loses something."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runs import TRAINERS, checkpoints, unitrain

RECIPE = f"""\
name: rows
trainer: {TRAINERS}:Slow
optimizer: {{lr: 1e-2, weight_decay: 0.1, clip: 1.0}}
train: {{steps: 40, global_batch: 10, micro_batch: 2, eval_every: 0}}
checkpoint: {{every: 7}}
recovery: {{hang_seconds: 2}}
strategy: {{name: ddp}}
"""
# What it has learned depends on how often it was started.
FORGETFUL = f"""\
import importlib.util
spec = importlib.util.spec_from_file_location("trainers", {str(TRAINERS)!r})
trainers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainers)


class Forgetful(trainers.Slow):
    def loss(self, model, batch):
        found = super().loss(model, batch)
        return found._replace(sum=found.sum * (1 + self.world.generation))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.yaml").write_text(RECIPE)
    return tmp_path


def test_a_run_survives_one_fault_of_every_kind_and_ends_as_if_there_had_been_none(folder):
    faults = {
        "enospc save=2": 0,
        "kill rank=1,step=9": 2,
        "sigterm step=16": 0,
        "stop rank=0,step=24": None,  # its save may be under way
        "corrupt newest,step=30": None,
    }
    flags = [word for fault in faults for word in (f"--{fault.split()[0]}", fault.split()[1])]
    done = unitrain("chaos", "rows.yaml", "--nproc", "2", *flags, "--out", "out", cwd=folder)
    assert (done.code, done.err) == (0, ""), done.out + done.err
    report = json.loads((folder / "out" / "chaos.json").read_text())
    assert report["passed"] and (report["samples_lost"], report["samples_repeated"]) == (0, 0)
    found = {fault["fault"]: fault for fault in report["faults"]}
    assert {name: fault["verdict"] for name, fault in found.items()} == dict.fromkeys(faults, "recovered")
    for name, redone in faults.items():
        assert found[name]["redone"] <= 7 if redone is None else abs(found[name]["redone"] - redone) <= 1, name
        assert 0 < found[name]["seconds"] <= found[name]["new_seconds"] or name.startswith("enospc")
    assert abs(found["kill rank=1,step=9"]["step"] - 9) <= 1, "not when it was asked for"
    assert report["tensors_compared"] > 4
    assert report["audit_problems"] == []
    assert report["tensors_that_differ"] == []
    assert done.out.splitlines()[-1] == "passed: out/chaos.json"
    assert "every bit of" in done.out
    assert checkpoints(folder / "out" / "disturbed"), "what the disk of its own held is kept"


def test_a_run_that_loses_something_fails_the_drill_and_the_step_is_named(folder):
    (folder / "forgetful.py").write_text(FORGETFUL)
    forgetful = ["trainer=forgetful.py:Forgetful", "train.steps=16"]
    done = unitrain(
        "chaos", "rows.yaml", "--nproc", "2", "--kill", "rank=0,step=9", *forgetful, "--out", "o", cwd=folder
    )
    assert done.code == 70, done.out + done.err
    report = json.loads((folder / "o" / "chaos.json").read_text())
    assert [fault["verdict"] for fault in report["faults"]] == ["recovered"]
    assert report["first_other_step"] == 8, "the first after the checkpoint that it went back to"
    assert report["tensors_that_differ"]
    assert "losses: another one first in step 8" in done.out
    assert done.out.splitlines()[-1] == "failed: o/chaos.json"
