"""One worker alone, and `unitrain.launch` from scripts, modules and notebooks: real processes that really train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINER = """
import numpy as np, torch
import unitrain

class Mine(unitrain.Trainer):
    def build_model(self):
        return torch.nn.Linear(3, 1)

    def build_source(self, split):
        x = np.arange(48, dtype=np.float32).reshape(16, 3) / 48
        return unitrain.ArraySource(x=x, y=x.sum(axis=1, keepdims=True))

    def loss(self, model, batch):
        batch["x"].repeat(1000, 200).exp().sum()  # enough for several threads, where there are any
        return torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def on(self, event, **facts):
        if event == "log":
            print("rank", self.world.rank, "of", self.world.size, "step", facts["step"])
            FAIL
"""
RECIPE = """
trainer: elsewhere:Unused
train: {steps: 4, global_batch: 8, log_every: 2}
checkpoint: {every: 0}
"""
CALL = """
result = unitrain.launch(Mine, "recipe.yaml", nproc=2, run_dir="run")
print("result", result.step, result.exit_code, sorted(result.evaluation))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def trainer(fail: str = "pass") -> str:
    return TRAINER.replace("FAIL", fail)


def python(*arguments: str, text: str | None = None, threads: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )


def assert_two_ranks_trained(done: subprocess.CompletedProcess[str], run: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2 step 4" in done.stdout
    assert "rank 1 of 2" not in done.stdout
    assert "rank 1 of 2 step 4" in (run / "logs" / "attempt-0" / "rank-1.log").read_text()
    assert done.stdout.rstrip().splitlines()[-1] == "result 4 0 ['loss']"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["split"] == "train"] == [2, 4]


def test_a_script_launches_its_own_class(folder: Path) -> None:
    (folder / "script.py").write_text(trainer() + "\nif __name__ == '__main__':" + CALL.replace("\n", "\n    "))
    assert_two_ranks_trained(python("script.py"), folder / "run")


def test_a_notebook_launches_the_class_of_a_cell_though_it_has_computed_before(folder: Path) -> None:
    warm_up = "a = torch.rand(512, 512)\n(a @ a).exp().sum()\n"  # starts the threads that a fork does not have
    done = python("-", text=trainer() + warm_up + CALL, threads=2)
    assert_two_ranks_trained(done, folder / "run")


def test_a_failing_rank_raises_in_the_notebook_and_its_error_is_the_last_word(folder: Path) -> None:
    failing = trainer("assert self.world.rank == 0, 'rank one has had enough'")
    done = python("-", text=failing + CALL)
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("unitrain.errors.RankFailed: AssertionError: rank one has had enough (see ")
    assert "rank 1 raised AssertionError" in done.stderr


def test_a_script_that_launches_when_it_is_imported_is_told_what_to_do(folder: Path) -> None:
    (folder / "script.py").write_text(trainer() + CALL)
    done = python("script.py")
    assert done.returncode == 1
    assert "put it below `if __name__ == '__main__':`" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("unitrain.errors.RankFailed: ")


def test_a_used_gpu_is_refused_before_a_notebook_is_forked(folder: Path) -> None:
    used = "torch.cuda.is_initialized = lambda: True\n"  # no device here can be used
    done = python("-", text=trainer() + used + CALL)
    assert "this process has used CUDA" in done.stderr.rstrip().splitlines()[-1]
    assert not (folder / "run").exists()


def test_a_worker_alone_trains_a_recipe_with_overrides(folder: Path) -> None:
    (folder / "mine.py").write_text(trainer())
    done = python("-m", "unitrain.worker", "recipe.yaml", "--run-dir", "run", "trainer=mine.py:Mine", "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 1 step 2" in done.stdout
    again = python("-m", "unitrain.worker", "run", "train.steps=3")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("override", "code", "last"),
    [
        ("train.stepz=2", 78, "did you mean 'train.steps'?"),
        ("trainer=mine.py:Mine2", 78, "did you mean 'Mine'?"),
        ("trainer=broken.py:Mine", 70, "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_a_worker_says_a_mistake_in_one_line_and_an_error_with_its_traceback(
    folder: Path, override: str, code: int, last: str
) -> None:
    (folder / "mine.py").write_text(trainer())
    (folder / "broken.py").write_text("import no_such_package")
    done = python("-m", "unitrain.worker", "recipe.yaml", override)
    assert done.returncode == code
    assert last in done.stderr.rstrip().splitlines()[-1]
    assert ("Traceback" in done.stderr) == (code == 70)
