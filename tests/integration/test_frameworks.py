"""One recipe in three frameworks: the same curve, and a run that goes from one to the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runs import launch, losses, resume, unitrain

ROOT = Path(__file__).parents[2]
CLOSE = 1e-4
GPT = ("model.layers=2", "model.width=64", "model.ffn=96", "data.seq_len=32", "train.global_batch=10")
CONVNET = """\
trainer: unitrain.tasks:Classification
model: {name: convnet, channels: 8, depth: 1}
data: {name: digits}
optimizer: {lr: 3e-3, weight_decay: 0.1, clip: 1.0}
schedule: {name: constant, warmup_steps: 3}
train: {steps: 12, global_batch: 20, micro_batch: 4, log_every: 1, eval_every: 0}
checkpoint: {every: 3}
"""


def verified(recipe: str, out: Path, *arguments: str) -> dict[str, float]:
    """The largest relative difference of a loss from `single`, by strategy, as `unitrain verify` reports it."""
    flags = ("--nproc", "2", "--steps", "12", "--out", out)
    unitrain("verify", ROOT / "recipes" / recipe, *flags, *arguments, cwd=out.parent).succeeded()
    report = json.loads((out / "verify.json").read_text())
    return {row["strategy"]: row["loss_difference"] for row in report["rows"] if row["strategy"] != "single"}


def test_a_language_model_has_one_curve_in_torch_jax_and_tensorflow(tmp_path: Path) -> None:
    found = verified("gpt_jax.yaml", tmp_path / "cut", "--strategies", "ddp,jax,tensorflow", *GPT)
    replicas = ("--strategies", "jax", "strategy.options={data: 2, fsdp: 1}")
    found["jax, data: 2"] = verified("gpt_jax.yaml", tmp_path / "replicas", *replicas, *GPT)["jax"]
    assert len(found) == 4
    assert max(found.values()) < CLOSE, found


def test_a_convolutional_network_has_one_curve_in_torch_jax_and_tensorflow(tmp_path: Path) -> None:
    found = verified(
        "digits_convnet.yaml", tmp_path / "out", "--strategies", "fsdp2,jax,tensorflow", "model.channels=8"
    )
    assert len(found) == 3
    assert max(found.values()) < CLOSE, found


def test_a_run_goes_from_torch_over_jax_and_tensorflow_back_to_torch(tmp_path: Path) -> None:
    launch(CONVNET, tmp_path / "whole", "single-1").succeeded()
    launch(CONVNET, tmp_path / "run", "ddp-2", "train.steps=3").succeeded()
    for shape, steps in (("jax-3", 6), ("tensorflow-2", 9), ("fsdp2-2", 12)):
        resume(tmp_path / "run", shape, f"train.steps={steps}").succeeded()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=CLOSE)
