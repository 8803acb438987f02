"""The real Horovod: under every starter, with its options, and when ranks fail."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from unitrain.batch import MicroBatch
from unitrain.errors import ExitCode
from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch_engine import LossModule
from unitrain.testing.contract import read_state

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="needs Horovod: python -m unitrain.build horovod"
)
# pip puts it beside Python, which need not be on PATH
FOUND = shutil.which("mpirun", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
needs_mpirun = pytest.mark.skipif(FOUND is None, reason="needs mpirun: pip install 'unitrain[mpi]'")
needs_mpi = pytest.mark.skipif(
    FOUND is None or not _torch_refusals.horovod_has_mpi(),
    reason="needs mpirun, and Horovod with MPI: python -m unitrain.build horovod --mpi",
)

TRAINERS = Path(__file__).with_name("horovod_trainers.py")
RECIPE = f"""\
name: rare
trainer: {TRAINERS}:Rare
optimizer: {{lr: 1e-2, weight_decay: 0.1, clip: 1.0}}
schedule: {{name: cosine, warmup_steps: 3}}
train: {{steps: 12, global_batch: 10, micro_batch: 2, log_every: 1, eval_every: 0}}
checkpoint: {{every: 12}}
strategy: {{name: horovod}}
"""
UNITRAIN = Path(sys.executable).with_name("unitrain")
HOROVODRUN = (Path(sys.executable).with_name("horovodrun"), "-np", "2", "--gloo")
MPIRUN = (str(FOUND), "--allow-run-as-root", "--oversubscribe", "-np", "2")
WORKER = (sys.executable, "-m", "unitrain.worker")
SECONDS_TO_NOTICE = 20  # a dead rank, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe; each test names its own run in it."""
    found = tmp_path_factory.mktemp("horovod")
    (found / "recipe.yaml").write_text(RECIPE)
    return found


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run that every other should equal: one process, without Horovod."""
    return run([*WORKER, "recipe.yaml", "--run-dir", "alone", "strategy={name: single}"], folder, "alone")


def run(command: Sequence[str | Path], folder: Path, name: str) -> Path:
    """Run a command that must succeed; the folder of its run."""
    done = ended(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / name


def ended(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with one thread a rank."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=200)


def launch(folder: Path, name: str, ranks: int, *overrides: str) -> Path:
    """A run by our own agent."""
    shape = ("--nproc", str(ranks), "--run-dir", name)
    return run([UNITRAIN, "launch", "recipe.yaml", *shape, *overrides], folder, name)


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    return [record["loss"] for record in records]


def assert_same_curve(found: Path, wanted: Path, *, rel: float = 1e-5) -> None:
    assert losses(found) == pytest.approx(losses(wanted), rel=rel)


# --- starters ----------------------------------------------------------------------------------------------------


def test_under_horovodrun_ranks_learn_what_one_process_learns(folder: Path, alone: Path) -> None:
    command = [*HOROVODRUN, *WORKER, "recipe.yaml", "--run-dir", "by-horovodrun"]
    assert_same_curve(run(command, folder, "by-horovodrun"), alone)


def test_ddp_too_runs_under_horovodrun(folder: Path) -> None:
    ddp = "strategy={name: ddp, options: {find_unused_parameters: true}}"
    command = [*HOROVODRUN, *WORKER, "recipe.yaml", "--run-dir", "ddp", ddp]
    assert len(losses(run(command, folder, "ddp"))) == 12


def test_under_torchrun_ranks_learn_what_one_process_learns(folder: Path, alone: Path) -> None:
    assert_same_curve(launch(folder, "by-torchrun", 2, "--launcher", "torchrun"), alone)


@needs_mpirun
def test_gloo_ranks_may_be_started_by_mpirun(folder: Path, alone: Path) -> None:
    assert_same_curve(run([*MPIRUN, *WORKER, "recipe.yaml", "--run-dir", "by-mpirun"], folder, "by-mpirun"), alone)


@needs_mpi
def test_mpi_ranks_learn_what_one_process_learns(folder: Path, alone: Path) -> None:
    command = [*MPIRUN, *WORKER, "recipe.yaml", "--run-dir", "mpi", "strategy.options.backend=mpi"]
    assert_same_curve(run(command, folder, "mpi"), alone)


@needs_mpi
def test_adasum_trains(folder: Path, alone: Path) -> None:
    command = [*MPIRUN, *WORKER, "recipe.yaml", "--run-dir", "adasum", "strategy.options.backend=mpi"]
    found = losses(run([*command, "strategy.options.adasum=true"], folder, "adasum"))
    wanted = losses(alone)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)  # before any update
    assert found != wanted
    assert np.mean(found[6:]) < 1.5 * np.mean(wanted[6:])


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_parameters_that_few_samples_use_move_as_in_one_process(folder: Path, alone: Path, ranks: int) -> None:
    found = launch(folder, f"rare-{ranks}", ranks)
    assert_same_curve(found, alone)
    here, there = (read_state(str(next(each.glob("checkpoints/*/MANIFEST.json")).parent)) for each in (found, alone))
    assert float(there["adamw.step", "never.weight"]) == 0
    assert 0 < float(there["adamw.step", "rare.weight"]) < 12
    for pair, value in there.items():
        np.testing.assert_allclose(here[pair], value, rtol=1e-4, atol=1e-6, err_msg=str(pair))


def test_a_bucket_travels_while_backward_goes_on() -> None:
    hvd = pytest.importorskip("horovod.torch")
    from unitrain.strategies.horovod import Summed

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    losses = LossModule(model, {"loss": lambda model, x: model(x["x"]).mean()}, torch.device("cpu"), precision="fp32")
    hvd.init()
    try:
        sharing = Summed(losses, {"fusion_threshold_mb": 0}, "overlap")
        seen: list[list[bool]] = []
        model[0].weight.register_hook(
            lambda grad: seen.append([bucket.handle is not None for bucket in sharing.buckets])
        )
        micro = MicroBatch({"x": torch.ones(2, 4)}, rows=2, key=0)
        sharing.before_update("loss", micro)
        for last in (False, True):
            sharing.before_micro(last)
            sharing.module("loss", micro).backward()
        sharing.collect()
    finally:
        hvd.shutdown()
    nothing, last_layer = [False] * 4, [True, True]
    assert seen[0] == nothing
    assert seen[1][:2] == last_layer and not all(seen[1])


def test_fp16_compression_stays_near_the_exact_curve_without_equalling_it(folder: Path, alone: Path) -> None:
    found = launch(folder, "fp16", 2, "strategy.options.compression=fp16")
    assert_same_curve(found, alone, rel=2e-3)
    assert losses(found)[1:] != losses(alone)[1:]


def test_compressed_gradients_of_a_large_sum_do_not_overflow(folder: Path) -> None:
    heavy = launch(folder, "heavy", 2, "strategy.options.compression=fp16", f"trainer={TRAINERS}:Heavy")
    records = [json.loads(line) for line in (heavy / "metrics.jsonl").read_text().splitlines()]
    assert all(record["applied"] == 1 for record in records)


def test_parameters_in_bfloat16_are_summed_in_float32(folder: Path) -> None:
    half = f"trainer={TRAINERS}:Half"
    alone = run([*WORKER, "recipe.yaml", "--run-dir", "half", "strategy={name: single}", half], folder, "half")
    assert_same_curve(launch(folder, "half-2", 2, half), alone, rel=5e-2)


def test_a_gradient_that_comes_twice_is_an_error_that_says_what_to_do(folder: Path) -> None:
    command = [UNITRAIN, "launch", "recipe.yaml", "--nproc", "2", "--run-dir", "twice", f"trainer={TRAINERS}:Twice"]
    done = ended(command, folder)
    assert done.returncode == ExitCode.BAD_RECIPE
    assert "use torch.utils.checkpoint with use_reentrant=False" in done.stderr.splitlines()[-1]


# --- ranks that fail ---------------------------------------------------------------------------------------------


def test_the_rank_that_failed_is_blamed_and_not_those_that_waited_for_it(folder: Path) -> None:
    command = [UNITRAIN, "launch", "recipe.yaml", "--nproc", "3", "--run-dir", "failing", f"trainer={TRAINERS}:Failing"]
    done = ended([*command, "recovery.restarts=0"], folder)
    assert done.returncode == ExitCode.FAILED
    assert "rank 1 raised ValueError" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1] == "ValueError: rank one has had enough"


def test_a_rank_whose_peer_is_killed_ends_by_itself_and_says_why(folder: Path) -> None:
    command = [*WORKER, "recipe.yaml", "--run-dir", "killed", f"trainer={TRAINERS}:Slow", "train.steps=100000"]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        metrics = folder / "killed" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < deadline and ranks[0].poll() is None
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGKILL)
        _, said = ranks[0].communicate(timeout=SECONDS_TO_NOTICE)
        assert ranks[0].returncode == ExitCode.FAILED
        assert (
            said.rstrip()
            .splitlines()[-1]
            .startswith("another rank of the run is gone or does not answer: Horovod says")
        )
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
