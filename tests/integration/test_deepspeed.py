"""DeepSpeed on several ranks, as users start it: roles that meet, bf16, other strategies' runs, its own checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from unitrain.checkpoint import CheckpointReader
from unitrain.importers.deepspeed_checkpoint import import_deepspeed_checkpoint

from .runs import ROWS, checkpoints, difference, launch, losses, resume

pytest.importorskip("deepspeed")

CUT_ALL = "strategy.options.zero_optimization={stage3_param_persistence_threshold: 0}"
STEPS = "train.steps=6"


def recipe(trainer: str) -> str:
    """The rows' recipe with another trainer."""
    return ROWS.replace(":Rows", f":{trainer}")


def test_roles_that_run_each_others_models_learn_as_on_ddp(tmp_path: Path) -> None:
    text = recipe("Adversaries")
    launch(text, tmp_path / "ddp", "ddp-2", STEPS, "train.eval_every=0").succeeded()
    for shape, options in (("zero2-2", []), ("zero3-2", [CUT_ALL])):
        launch(text, tmp_path / shape, shape, STEPS, "train.eval_every=0", *options).succeeded()
        assert difference(losses(tmp_path / shape), losses(tmp_path / "ddp")) < 1e-5
        told = [CheckpointReader(str(checkpoints(tmp_path / run)[-1])).state for run in (shape, "ddp")]
        assert difference(told[0]["extra"]["told"], told[1]["extra"]["told"]) < 1e-5


def test_bf16_follows_ddps_bf16_and_keeps_fp32_masters(tmp_path: Path) -> None:
    launch(ROWS, tmp_path / "ddp", "ddp-2", STEPS, "train.precision=bf16").succeeded()
    for strategy in ("zero1", "zero2", "zero3"):
        launch(ROWS, tmp_path / strategy, f"{strategy}-2", STEPS, "train.precision=bf16").succeeded()
        assert difference(losses(tmp_path / strategy), losses(tmp_path / "ddp")) < 1e-2
        reader = CheckpointReader(str(checkpoints(tmp_path / strategy)[-1])).role("model")
        assert {info.dtype for info in reader.tensors.values()} == {"float32"}


def test_a_run_goes_from_ddp_over_zero2_and_zero3_back(tmp_path: Path) -> None:
    constant = "schedule={name: constant}"  # others stretch with the steps
    launch(ROWS, tmp_path / "whole", "ddp-2", constant).succeeded()
    moving = tmp_path / "moving"
    launch(ROWS, moving, "ddp-2", "train.steps=5", constant).succeeded()
    for shape, steps in (("zero2-3", 10), ("zero3_offload-2", 15), ("single-1", 20)):
        resume(moving, shape, f"train.steps={steps}").succeeded()
    assert difference(losses(moving), losses(tmp_path / "whole")) < 1e-5


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_what_deepspeed_saved_is_imported_bit_for_bit(tmp_path: Path, strategy: str) -> None:
    run = tmp_path / "run"
    done = launch(recipe("KeptByDeepSpeed"), run, f"{strategy}-3", STEPS).succeeded()
    assert "DeepSpeed" not in done.out + done.err, "its remarks are not for the terminal"
    found = import_deepspeed_checkpoint(run / "deepspeed", tmp_path / "imported")
    assert (found.stage, found.ranks, found.masters) == (int(strategy[-1]), 3, True)
    tensors = load_file(tmp_path / "imported" / "model.safetensors")
    ours = CheckpointReader(str(checkpoints(run)[-1])).role("model")
    names = [name for kind, name in ours.tensors if kind == "param"]
    assert sorted(tensors) == sorted(f"model.{name}" for name in names)
    for name in names:
        shape = ours.tensors["param", name].shape
        assert np.array_equal(tensors[f"model.{name}"], ours.read("param", name, (0,) * len(shape), shape))
