"""Every mistake and every failure ends in one clear message and an exit code that says whether a retry can help."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unitrain import worker

from .runs import ROWS, TRAINERS, checkpoints, damage, fit, launch, losses, resume, run, unitrain

BAD_RECIPE, FAILED = 78, 70

MISTAKES = f"""
import sys
sys.path.insert(0, {str(TRAINERS.parent)!r})
import torch
import unitrain
from trainers import Rows

class Vector(Rows):
    def loss(self, model, batch):
        return (model(batch["x"]) - batch["y"]).square().flatten()

class VectorWeight(Rows):
    def loss(self, model, batch):
        return super().loss(model, batch)._replace(weight=batch["weight"])

class Constant(Rows):
    def loss(self, model, batch):
        return torch.tensor(1.0)

class LoneMetric(Rows):
    def loss(self, model, batch):
        return super().loss(model, batch)._replace(metrics={{"accuracy": 0.5}})

class TakenMetric(Rows):
    def loss(self, model, batch):
        return super().loss(model, batch)._replace(metrics={{"loss": (1, 1)}})

class LostMetric(Rows):
    def loss(self, model, batch):
        return super().loss(model, batch)._replace(metrics={{"step": (1, 1)}})

class NoModel(Rows):
    def build_model(self):
        torch.nn.Linear(6, 1)

class NoSource(Rows):
    def build_source(self, split):
        return [1, 2, 3]

class NoRole(Rows):
    def roles(self):
        return {{"model": self.build_model}}

class NoLoss(unitrain.Trainer):
    build_model, build_source = Rows.build_model, Rows.build_source

class Unsaved(Rows):
    def on(self, event, **facts):
        self.extra["model"] = self.engines

class OneRank(Rows):
    def loss(self, model, batch):
        if self.cursor.step == 3 and self.world.rank == 1:
            raise ValueError("rank 1 has seen a bad row")
        return super().loss(model, batch)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "mistakes.py").write_text(MISTAKES)
    return folder


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (
            ROWS.replace("global_batch", "globl_batch"),
            [],
            "error: rows.yaml:5: no key 'train.globl_batch', did you mean 'train.global_batch'?",
        ),
        (
            ROWS,
            ["train.steps=many"],
            "error: on the command line: train.steps is 'many' (str); it must be a whole number",
        ),
        (ROWS, ["train.steps=-1"], "error: on the command line: train.steps is -1; it must be at least 0"),
        (
            ROWS,
            ["--strategy", "ddp", "--nproc", "11"],
            "error: 11 ranks cannot share a batch of 10 samples; use at most 10 ranks or a larger train.global_batch",
        ),
        (ROWS, ["--strategy", "dpp"], "error: no strategy named 'dpp', did you mean 'ddp'?; known: "),
        (
            ROWS,
            ["--strategy", "ddp", "strategy.options={bucket_cap: 3}"],
            "error: strategy 'ddp' has no option 'bucket_cap', did you mean 'bucket_cap_mb'?; known: ",
        ),
        (
            ROWS,
            ["--strategy", "fsdp2", "--nproc", "2", "strategy.options={shard_size: 3}"],
            "error: strategy.options.shard_size is 3, which does not divide 2 ranks into groups; use a divisor",
        ),
        (
            ROWS,
            ["trainer=missing.py:Mine"],
            "error: on the command line: trainer is 'missing.py:Mine', and there is no",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_starts(
    tmp_path: Path, text: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "rows.yaml").write_text(text)
    ended = unitrain("launch", "rows.yaml", "--run-dir", "run", *arguments, cwd=tmp_path)
    assert (ended.code, ended.out) == (BAD_RECIPE, "")
    assert ended.err.startswith(message), ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    ended = unitrain("launch", "rows.yaml", cwd=tmp_path)
    assert (ended.code, ended.out, ended.err) == (BAD_RECIPE, "", "error: no recipe file 'rows.yaml'\n")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(
        "trainer: unitrain.tasks:Classification\nmodel: {name: mlp}\ndata: {name: digits}\n"
    )
    without = "import sys; sys.modules['sklearn'] = None; from unitrain.cli import main; main()"
    ended = run([sys.executable, "-c", without, "launch", "digits.yaml"], cwd=tmp_path)
    assert (ended.code, ended.out) == (BAD_RECIPE, "")
    assert ended.err == "error: data source 'digits' needs scikit-learn: pip install 'unitrain[digits]'\n"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (
            "Vector",
            78,
            "the loss function 'loss' returned a Tensor of shape (2,); return a scalar tensor (the mean over",
        ),
        ("VectorWeight", 78, "the loss function 'loss' returned a weight of shape (2,); return a scalar"),
        ("Constant", 78, "the loss function 'loss' returned a loss that no trainable parameter leads to; compute it"),
        (
            "LoneMetric",
            78,
            "the loss function 'loss' returned the metric 'accuracy' as a float; return the pair (sum, weight)",
        ),
        ("TakenMetric", 78, "the loss function 'loss' returned a metric named 'loss', which"),
        ("LostMetric", 78, "the loss function returned a metric named 'step', which every record has already; rename"),
        ("NoModel", 78, "build_model returned a NoneType; a torch strategy needs a torch.nn.Module"),
        ("NoSource", 78, "NoSource.build_source('train') returned a list; return a unitrain.Source"),
        ("NoRole", 78, "NoRole.roles() has a method as 'model'; give a unitrain.Role"),
        ("NoLoss", 78, "NoLoss has no loss; override it to return a scalar or a Loss"),
        ("Unsaved", 70, "the trainer's state is not JSON: Object of type TorchEngine is not JSON serializable; keep"),
        (
            "Absent",
            78,
            "trainer is '{folder}/mistakes.py:Absent', but {folder}/mistakes.py has no Absent; its trainers: Rows, ",
        ),
    ],
)
def test_a_mistake_in_a_trainer_is_told_without_a_traceback(
    folder: Path, name: str, code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the worker, the process of a rank, ends with; the command line prints that last."""
    recipe = ROWS.replace(f"{TRAINERS}:Rows", f"mistakes.py:{name}").replace(
        "checkpoint", "strategy: {name: single}\ncheckpoint"
    )
    (folder / f"{name}.yaml").write_text(recipe)
    found = worker.main([str(folder / f"{name}.yaml"), "train.steps=2", "--run-dir", str(folder / name)])
    said = capfd.readouterr().err
    assert (found, said.count("\n")) == (code, 1), said
    assert said.startswith(message.replace("{folder}", str(folder))), said


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_text(
        "trainer: unitrain.tasks:LanguageModel\nmodel: {name: gpt}\ndata: {name: text, path: gone.txt}\n"
    )
    ended = unitrain("launch", "text.yaml", "--run-dir", "run", "--nproc", "2", cwd=tmp_path)
    assert ended.code == BAD_RECIPE
    assert ended.last_line == (
        "data.path names 'gone.txt', which is no file, folder or glob; correct it, "
        "or use 'python-stdlib', which is always there"
    )
    assert "Traceback" not in ended.err


def test_a_rank_refuses_for_all_and_is_the_last_to_speak(folder: Path) -> None:
    ended = launch(ROWS, folder / "run", "ddp-2", "trainer=mistakes.py:Vector")
    assert ended.code == BAD_RECIPE
    assert ended.last_line == (
        "the loss function 'loss' returned a Tensor of shape (1,); return a scalar tensor (the mean over its rows) or "
        "unitrain.Loss(sum, weight) with a scalar sum"
    )
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("shape", ["ddp-2", "ddp-3", "fsdp2-2"])
def test_the_first_failing_ranks_exception_is_the_last_line(folder: Path, shape: str) -> None:
    ended = launch(ROWS, folder / shape, shape, "trainer=mistakes.py:OneRank", "recovery.restarts=0")
    assert ended.code == FAILED
    assert ended.last_line == "ValueError: rank 1 has seen a bad row"
    assert ended.err.startswith("rank 1 raised ValueError (pid ")
    assert ended.err.count("Traceback (most recent call last)") == 1
    assert len(losses(folder / shape)) == 3


def test_a_checkpoint_that_is_damaged_and_the_only_one_is_named(tmp_path: Path) -> None:
    fit(ROWS, tmp_path / "run", "train.steps=2")
    (only,) = checkpoints(tmp_path / "run")
    damage(only / "part-0-0.safetensors")
    ended = resume(tmp_path / "run", "single-1")
    assert ended.code == FAILED
    assert f"{only}/part-0-0.safetensors is damaged" in ended.last_line
    assert "Traceback" not in ended.err
