"""Strategy `jax` under real runs: one curve on any mesh, exact resumption, and a quick end where a rank is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flax")

from unitrain.agent.records import AGENT, read_record
from unitrain.checkpoint import CheckpointReader
from unitrain.cursor import sample_ids
from unitrain.meeting import free_port
from unitrain.testing.contract import read_state
from unitrain.world import LOOPBACK

from .runs import COMMAND, ROWS, TRAINERS, checkpoints, copied, difference, fit, launch, losses, resume, samples

TIGHT = 1e-5
JAX = TRAINERS.with_name("jax_trainers.py")
RECIPE = ROWS.replace(str(TRAINERS), str(JAX))
NUM_ROWS = 203
KILLED = ["train.steps=40", "train.eval_every=0", "checkpoint.every=7", f"trainer={JAX}:Slow"]
END_SECONDS = 10.0


def jax_trainer(name: str) -> str:
    return f"trainer={JAX}:{name}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jax")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """A run of one rank."""
    fit(RECIPE, folder / "alone", strategy="jax")
    return folder / "alone"


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, {}), (2, {"fsdp": 2}), (3, {"local_devices": 2, "fsdp": 3, "tensor": 2})],
    ids=["data", "fsdp", "all axes"],
)
def test_every_mesh_follows_one_curve(folder: Path, alone: Path, ranks: int, options: dict[str, int]) -> None:
    run = folder / f"mesh-{ranks}-{'-'.join(options)}"
    chosen = [f"strategy.options.{name}={size}" for name, size in options.items()]
    shown = launch(RECIPE, run, f"jax-{ranks}", *chosen).succeeded()
    assert "Gloo" not in shown.out + shown.err, "a library's noise stays in the ranks' logs"
    assert difference(losses(run), losses(alone)) < TIGHT
    assert samples(alone) == [sample_ids(0, step, 10, NUM_ROWS).tolist() for step in range(20)]


@pytest.mark.parametrize("kind", ["Noisy", "Pure", "Own", "Distilled"])
def test_a_run_resumes_exactly_and_has_the_same_curve_on_two_ranks(folder: Path, kind: str) -> None:
    whole = folder / f"whole-{kind}"
    launch(RECIPE, whole, "jax-2", jax_trainer(kind)).succeeded()
    half = copied(whole, folder / f"half-{kind}", up_to=10)
    resume(half, "jax-2").succeeded()
    assert losses(half) == losses(whole)
    before, after = (read_all(run) for run in (whole, half))
    assert {name: value.tobytes() for name, value in before.items()} == {
        name: value.tobytes() for name, value in after.items()
    }
    if kind != "Noisy":  # dropout and batch norm depend on how rows are cut
        fit(RECIPE, folder / f"one-{kind}", jax_trainer(kind), strategy="jax")
        assert difference(losses(whole), losses(folder / f"one-{kind}")) < TIGHT


def read_all(run: Path) -> dict[tuple[str, ...], Any]:
    """All state of a run's last checkpoint, by role, kind and name."""
    found = {}
    last = str(checkpoints(run)[-1])
    for role in CheckpointReader(last).roles:
        reader = CheckpointReader(last).role(role)
        for (kind, name), info in reader.tensors.items():
            found[role, kind, name] = reader.read(kind, name, (0,) * len(info.shape), tuple(info.shape))
    return found


def test_running_statistics_and_optax_state_are_in_the_checkpoint(folder: Path) -> None:
    noisy = read_state(str(checkpoints(folder / "whole-Noisy")[-1]))
    assert {name for kind, name in noisy if kind == "buffer"} == {"norm.mean", "norm.var"}
    assert np.abs(noisy["buffer", "norm.mean"]).max() > 0
    own = read_state(str(checkpoints(folder / "whole-Own")[-1]))
    assert {kind for kind, _ in own} == {"param", "optim.0.nu", "optim.2.trace"}


class Going:
    """A run that is about to lose a rank."""

    def __init__(self, run: Path, *command: str | Path) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [*command, *KILLED],
            cwd=run.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def reach(self, step: int) -> None:
        """Wait until the run has gone so far."""
        wait_for(lambda: self.run.exists() and len(steps_of(self.run)) >= step, f"it never reached step {step}")


def steps_of(run: Path) -> list[str]:
    path = run / "samples-0.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(there: Any, otherwise: str) -> None:
    deadline = time.monotonic() + 100
    while not there():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[float]:
    launch(RECIPE, folder / "undisturbed", "jax-2", *KILLED).succeeded()
    return losses(folder / "undisturbed")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_within_seconds_and_it_resumes_exactly(
    folder: Path, undisturbed: list[float], victim: int
) -> None:
    run = folder / f"killed-{victim}"
    recipe = folder / f"killed-{victim}.yaml"
    recipe.write_text(RECIPE)
    shape = ["--strategy", "jax", "--nproc", "2"]
    going = Going(run, COMMAND, "launch", recipe, *shape, "--run-dir", run, "recovery.restarts=0")
    going.reach(17)
    agent = read_record(run / AGENT)
    assert agent is not None, "ranks have written, so the agent has too"
    os.kill(agent["ranks"][str(victim)], signal.SIGKILL)
    began = time.monotonic()
    assert going.process.wait(timeout=60) == 70
    assert time.monotonic() - began < END_SECONDS
    resume(run, "jax-2").succeeded()
    assert losses(run) == undisturbed
    assert samples(run) == [sample_ids(0, step, 10, NUM_ROWS).tolist() for step in range(40)]


@pytest.mark.parametrize("victim", [0, 1])
def test_without_our_agent_a_rank_that_loses_another_says_which_and_ends(folder: Path, victim: int) -> None:
    run = folder / f"bare-{victim}"
    recipe = folder / f"bare-{victim}.yaml"
    recipe.write_text(RECIPE + "strategy: {name: jax}\n")
    port = free_port(LOOPBACK)
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        command = [sys.executable, "-m", "unitrain.worker", recipe, "--run-dir", run, *KILLED]
        environ = {name: str(value) for name, value in place.items()} | {
            "MASTER_ADDR": LOOPBACK,
            "OMP_NUM_THREADS": "1",
        }
        ranks.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        wait_for(lambda: len(steps_of(run)) > 5, "it never began")
        ranks[victim].kill()
        began = time.monotonic()
        out, _ = ranks[1 - victim].communicate(timeout=60)
        assert time.monotonic() - began < END_SECONDS
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[1 - victim].returncode == 70, out
    assert f"rank {victim} has gone" in out


def test_the_error_of_one_rank_is_the_last_word_of_the_run(folder: Path) -> None:
    began = time.monotonic()
    ended = launch(RECIPE, folder / "failing", "jax-2", jax_trainer("FailsOnOne"), "recovery.restarts=0")
    assert time.monotonic() - began < 60
    assert ended.code == 70
    assert ended.last_line == "ValueError: rank 1 has had enough"
