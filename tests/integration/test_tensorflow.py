"""Runs of the strategy `tensorflow`: a rank that dies or freezes ends the others, and a resumed run goes on exactly."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from unitrain.agent.records import AGENT, Process, read_record

from .runs import COMMAND, Ended, copied, difference, events, losses, metrics, resume, unitrain

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed")

TRAINERS = Path(__file__).with_name("tf_trainers.py")
STEPS = 24
# Micro-batches of three rows on one, two and four ranks: batch norm's statistics are theirs.
ROWS = f"""\
name: rows
trainer: {TRAINERS}:Rows
strategy: {{name: tensorflow}}
optimizer: {{lr: 1e-2, weight_decay: 0.1, clip: 1.0}}
schedule: {{name: cosine, warmup_steps: 3}}
train: {{steps: {STEPS}, global_batch: 12, micro_batch: 3, log_every: 1, eval_every: {STEPS}}}
checkpoint: {{every: 5}}
"""
NOTICED_SECONDS = 10.0  # a dead rank
FROZEN_SECONDS = 30.0  # TensorFlow waits ten for a sign of life


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensorflow")
    (folder / "rows.yaml").write_text(ROWS)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[float]:
    """The curve of two ranks that nobody disturbed; its terminal shows nothing of TensorFlow's."""
    done = launch(folder, "whole", 2).succeeded()
    said = done.out + done.err
    assert "step 24/24" in said
    ours = ("whole: ", "step ", "eval step ", "saved step ", "done: ")
    assert [line for line in said.splitlines() if not line.strip().startswith(ours)] == []
    assert not events(folder / "whole", "fork_refused"), "TensorFlow was imported once, and the ranks were forked"
    return losses(folder / "whole")


def launch(folder: Path, name: str, ranks: int, *overrides: str) -> Ended:
    return unitrain(
        "launch", folder / "rows.yaml", "--nproc", str(ranks), "--run-dir", folder / name, *overrides, cwd=folder
    )


class Going:
    """A run on two ranks, one of which is about to be struck by a signal."""

    def __init__(self, folder: Path, name: str) -> None:
        self.run = folder / name
        self.process = subprocess.Popen(
            [
                COMMAND,
                "launch",
                folder / "rows.yaml",
                "--nproc",
                "2",
                "--run-dir",
                self.run,
                f"trainer={TRAINERS}:Slow",
                "recovery.restarts=0",
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def struck(self, rank: int, number: signal.Signals, after: int) -> tuple[float, str]:
        """Seconds from the signal, after a step, to the end of everything; and what was said."""
        deadline = time.monotonic() + 120
        while not (records := metrics(self.run) if (self.run / "metrics.jsonl").exists() else []) or (
            records[-1]["step"] < after
        ):
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()[0]
            time.sleep(0.01)
        agent = read_record(self.run / AGENT)
        assert agent is not None
        ranks = {int(key): Process.of(pid) for key, pid in agent["ranks"].items()}
        began = time.monotonic()
        os.kill(ranks[rank].pid, number)
        said, _ = self.process.communicate(timeout=60)
        seconds = time.monotonic() - began
        assert self.process.returncode == 70, said
        assert not any(process.alive for process in ranks.values()), "something is left running"
        return seconds, said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_at_once_and_resuming_changes_no_bit(
    folder: Path, whole: list[float], rank: int
) -> None:
    name = f"killed-{rank}"
    seconds, said = Going(folder, name).struck(rank, signal.SIGKILL, after=8)
    assert seconds < NOTICED_SECONDS
    assert f"rank {rank} was killed by SIGKILL" in said
    other = (folder / name / "logs" / "attempt-0" / f"rank-{1 - rank}.log").read_text()
    assert f"rank {rank} has gone" in other
    resume(folder / name, "tensorflow-2", f"trainer={TRAINERS}:Rows").succeeded()
    assert losses(folder / name) == whole


def test_a_frozen_rank_ends_the_run_too(folder: Path, whole: list[float]) -> None:
    seconds, said = Going(folder, "frozen").struck(1, signal.SIGSTOP, after=4)
    assert seconds < FROZEN_SECONDS
    assert "rank 1 no longer answers" in said


def test_one_rank_goes_on_where_two_have_been(folder: Path, whole: list[float]) -> None:
    alone = copied(folder / "whole", folder / "alone", up_to=15)
    resume(alone, "tensorflow-1").succeeded()
    assert difference(losses(alone), whole) < 1e-5


def test_an_optimizer_of_keras_goes_on_exactly(folder: Path) -> None:
    own = f"trainer={TRAINERS}:Own"
    launch(folder, "own-half", 2, own, "train.steps=10", "schedule.name=constant").succeeded()
    launch(folder, "own-whole", 2, own, "schedule.name=constant").succeeded()
    resume(folder / "own-half", "tensorflow-2", f"train.steps={STEPS}").succeeded()
    assert losses(folder / "own-half") == losses(folder / "own-whole")
