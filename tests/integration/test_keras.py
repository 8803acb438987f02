"""A user's own Keras 3 model: one file on every framework, from the same weights, with one kind of checkpoint."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unitrain.checkpoint import CheckpointReader, list_checkpoints
from unitrain.run import Run

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "recipes" / "digits_keras.yaml"
COMMAND = Path(sys.executable).with_name("unitrain")
NEEDS = {
    "torch": "torch",
    "jax": "flax",
    "tensorflow": "tensorflow",
    "ddp": "torch",
    "fsdp2": "torch",
    "zero2": "deepspeed",
}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")


def there(names: list[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(NEEDS[name]) is not None]


BACKENDS = there(["torch", "jax", "tensorflow"])
STRATEGIES = there(["ddp", "zero2", "fsdp2", "jax", "tensorflow"])


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """What each backend makes of the models in keras_cases.py; one process a backend."""
    quiet = ["env", "TF_CPP_MIN_LOG_LEVEL=3", "CUDA_VISIBLE_DEVICES=-1", "OMP_NUM_THREADS=1"]
    started = {
        backend: subprocess.Popen(
            [*quiet, sys.executable, HERE / "keras_cases.py", backend],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for backend in BACKENDS
    }
    found = {}
    for backend, process in started.items():
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        found[backend] = json.loads(out)
    return found


@pytest.mark.parametrize("model", ["everything", "nested"])
def test_a_model_has_the_same_names_and_first_values_on_every_backend(cases: dict[str, Any], model: str) -> None:
    first, *others = (case[model] for case in cases.values())
    assert first["params"] and first["buffers"]
    for other in others:
        assert other == first | {"moments": other["moments"]}


def test_names_count_the_layers_of_the_model_alone(cases: dict[str, Any]) -> None:
    for case in cases.values():
        assert case["nested"]["params"][0] == "part/dense_1/kernel"
        assert case["nested"]["buffers"] == ["dense/kernel", "dense/bias"], "a frozen layer is not trained"
        assert "conv1d/kernel" in case["everything"]["params"]
        assert case["everything"]["seeds"], "a dropout that acts has a seed generator"


def test_first_values_follow_the_initializer_and_the_seed(cases: dict[str, Any]) -> None:
    case = next(iter(cases.values()))
    model = case["everything"]
    moments = model["moments"]
    assert moments["embedding/embeddings"][1] == pytest.approx(0.1 / 12**0.5, rel=0.1)  # uniform in +-0.05
    assert moments["dense/kernel"][0] == pytest.approx(1.0, abs=0.02)
    assert moments["conv1d/kernel"][1] == pytest.approx(0.3 * 0.88, rel=0.15)
    assert moments["square/kernel"][1] == pytest.approx(2 / 3, rel=0.1)  # 9 orthogonal rows of length 2
    assert moments["bidirectional/forward_lstm/lstm_cell/bias"][0] == 0.25, "forget gates begin with 1"
    assert model["bits"]["a/kernel"] != model["bits"]["b/kernel"]
    assert model["bits"]["square/kernel"] != case["other seed"]


def test_a_model_called_without_training_runs_as_the_engine_says(cases: dict[str, Any]) -> None:
    quiet = next(iter(cases.values()))["quiet"]
    for case in cases.values():
        np.testing.assert_allclose(case["quiet"], quiet, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(case["explicit"], case["quiet"], rtol=1e-6, err_msg="what the loss says counts")
        assert not np.allclose(case["training"], case["quiet"], rtol=0.01)


def test_models_that_cannot_be_trained_alike_are_refused(cases: dict[str, Any]) -> None:
    for backend, case in cases.items():
        said = case["refusals"]
        assert "without weights; begin it with keras.Input" in said["unbuilt"]
        assert "two variables of the Keras model 'sequential' are called 'inner/kernel'" in said["alike"]
        assert "made variables when it was first called" in said["late"]
        other = "jax" if backend == "torch" else "torch"
        assert f"on the {backend} backend, and the strategy needs {other}" in said["backend"]
        assert f"KERAS_BACKEND={other}" in said["backend"]


def launched(folder: Path, *arguments: str, verb: str = "launch") -> Run:
    """A run of the recipe on two ranks, or one gone on with."""
    path = [RECIPE, "--run-dir", folder] if verb == "launch" else [folder]
    command = ["env", "OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES=", COMMAND, verb, *path, "--nproc", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(folder)


def losses(run: Run) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in run.metrics() if record["split"] == "train"}


def tensors(run: Run, step: int) -> dict[tuple[str, str], Any]:
    sound = list_checkpoints(str(run.folder / "checkpoints")).sound
    reader = CheckpointReader(next(found.folder for found in sound if found.step == step)).role("model")
    return {
        (kind, name): reader.read(kind, name, (0,) * len(info.shape), tuple(info.shape))
        for (kind, name), info in reader.tensors.items()
    }


OPTIONS = ["train.log_every=1", "train.eval_every=20", "checkpoint.every=10", "schedule.name=constant"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """20 steps of the recipe on each strategy."""
    folder = tmp_path_factory.mktemp("keras")
    return {name: launched(folder / name, "--strategy", name, "train.steps=20", *OPTIONS) for name in STRATEGIES}


def test_one_keras_file_has_one_loss_curve_on_every_strategy(runs: dict[str, Run]) -> None:
    reference = losses(runs["ddp"])
    assert len(reference) == 20 and reference[20] < reference[1]
    for name, run in runs.items():
        found = losses(run)
        assert found.keys() == reference.keys()
        for step, loss in found.items():
            assert loss == pytest.approx(reference[step], rel=1e-4), f"{name}, step {step}"


def test_checkpoints_of_all_strategies_hold_the_same_tensors(runs: dict[str, Run]) -> None:
    reference = tensors(runs["ddp"], 20)
    assert ("param", "head/kernel") in reference and ("adamw.v", "conv2d/kernel") in reference
    for name, run in runs.items():
        found = tensors(run, 20)
        assert found.keys() == reference.keys(), name
        for pair, value in found.items():
            assert value.shape == reference[pair].shape and value.dtype == reference[pair].dtype, (name, pair)
            if pair[0] == "param":
                np.testing.assert_allclose(value, reference[pair], rtol=1e-2, atol=1e-4, err_msg=f"{name} {pair}")


def test_a_run_goes_from_framework_to_framework_with_its_running_statistics(tmp_path: Path) -> None:
    """Batch norm's statistics are in every checkpoint, and dropout's state in none."""
    chain = [name for name in ("ddp", "jax", "zero2", "tensorflow", "ddp") if name in STRATEGIES]
    options = [*OPTIONS, "model.norm=batch", "model.dropout=0.1", "checkpoint.every=1000"]
    run = launched(tmp_path / "run", "--strategy", chain[0], "train.steps=5", *options)
    seen = tensors(run, 5)
    assert ("buffer", "batch_normalization/moving_mean") in seen
    assert not [name for _, name in seen if "seed" in name]
    for number, name in enumerate(chain[1:], start=2):
        run = launched(tmp_path / "run", "--strategy", name, f"train.steps={5 * number}", verb="resume")
        after = tensors(run, 5 * number)
        assert after.keys() == seen.keys(), name
        assert after["adamw.step", "head/kernel"] == 5 * number
        assert not np.array_equal(
            after["buffer", "batch_normalization/moving_mean"], seen["buffer", "batch_normalization/moving_mean"]
        )
        seen = after
    curve = losses(run)
    assert sorted(curve) == list(range(1, 5 * len(chain) + 1))
    assert curve[max(curve)] < 0.7 * curve[1]


def test_dropout_draws_the_same_after_a_resume(tmp_path: Path) -> None:
    options = [*OPTIONS, "model.dropout=0.5", "train.micro_batch=8", "train.eval_every=0"]
    straight = launched(tmp_path / "straight", "--strategy", "ddp", "train.steps=6", *options)
    parted = launched(tmp_path / "parted", "--strategy", "ddp", "train.steps=3", *options)
    parted = launched(tmp_path / "parted", "--strategy", "ddp", "train.steps=6", verb="resume")
    assert losses(parted) == losses(straight)
