"""A rank that is killed between two checkpoints loses no more steps than since the last snapshot in memory."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from unitrain.audit import audit
from unitrain.run import Run

from .runs import ROWS, curve, events, losses, trainer
from .test_recovery import assert_same, launched, redone

STEPS, EVERY = 40, 3
SLOW = [trainer("Slow"), f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=30", "checkpoint.async=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.mark.parametrize("shape", ["ddp-2", "fsdp2-2"])
def test_kills_between_checkpoints_cost_at_most_the_steps_since_the_last_snapshot(folder: Path, shape: str) -> None:
    curve(ROWS, folder / f"whole-{shape}", shape, *SLOW)
    run = folder / f"killed-{shape}"
    kills = [(1, 5), (0, 11), (1, 17), (0, 27), (1, 35)]
    going = launched(run, shape, *SLOW, f"checkpoint.memory_every={EVERY}")
    for attempts, (rank, step) in enumerate(kills, 1):
        going.after(step, attempts=attempts).signal(signal.SIGKILL, rank)
    going.ended().succeeded()
    assert_same(run, folder / f"whole-{shape}")
    assert [event["rank"] for event in events(run, "restart")] == [rank for rank, _ in kills]
    began = [event["step"] for event in events(run, "start")[1:]]
    assert all(step - EVERY <= at <= step + EVERY for (_, step), at in zip(kills, began, strict=True)), began
    assert max(redone(run), default=0) <= EVERY
    assert events(run, "snapshot_damaged") == []
    assert len(losses(run)) == STEPS
    assert audit(Run(run)).problems == []
