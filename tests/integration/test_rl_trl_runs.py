"""TRL's own trainers as runs of ours: recipes, metrics, checkpoints, signals and exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from unitrain.errors import CheckpointMismatch, RecipeError, Refused
from unitrain.rl import trl_folders

from .runs import COMMAND, damage, events, fit, launch, metrics, resume
from .test_rl import wait_for_ranks

pytest.importorskip("trl", reason="not run: TRL is not installed")

ADD = """\
name: trl
trainer: unitrain.rl:TRLSFT
model:
  name: hf
  config: {model_type: llama, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
           vocab_size: 256, max_position_embeddings: 32}
data: {name: records, path: "unitrain.rl.examples:addition", seq_len: 12}
optimizer: {lr: 3e-3, clip: 1.0, weight_decay: 0.1}
schedule: {name: linear, warmup_steps: 2, decay_steps: 20}
train: {steps: 6, global_batch: 8, micro_batch: 2, log_every: 1, eval_every: 3, eval_batches: 2}
checkpoint: {every: 2, keep: 9}
"""
DPO = ["trainer=unitrain.rl:TRLDPO", 'data.path="unitrain.rl.examples:addition_pairs"']
KTO = ["trainer=unitrain.rl:TRLKTO", 'data.path="unitrain.rl.examples:addition_labels"']
SHORT = ["train.steps=2", "train.eval_every=2", "train.micro_batch=null"]
pytestmark = [pytest.mark.filterwarnings("ignore")]  # of libraries among themselves


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in folder.glob("checkpoints/*/unitrain.json"))


def started(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """A run of two ranks that has saved a checkpoint and goes on."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(ADD)
    shape = ["--strategy", "ddp", "--nproc", "2", "--run-dir", folder]
    launched = subprocess.Popen(
        [COMMAND, "launch", recipe, *shape, "train.steps=1000", "recovery.restarts=0", *overrides],
        cwd=folder.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ,
        process_group=0,
    )
    deadline = time.monotonic() + 120
    while not steps_saved(folder):
        assert time.monotonic() < deadline and launched.poll() is None
        time.sleep(0.05)
    return launched


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    launch(ADD, tmp_path / "whole", "ddp-2").succeeded()
    launched = started(tmp_path / "killed")
    os.killpg(launched.pid, signal.SIGKILL)
    launched.wait()
    wait_for_ranks(tmp_path / "killed")
    saved = steps_saved(tmp_path / "killed")
    for step in saved[1:]:  # go on from the first, whatever came later
        (tmp_path / f"killed/checkpoints/checkpoint-{step}/unitrain.json").unlink()
    resume(tmp_path / "killed", "ddp-2", "train.steps=6").succeeded()
    whole, killed = (
        [(record["step"], record["split"], record["loss"]) for record in [*metrics(path), *metrics(path, "eval")]]
        for path in (tmp_path / "whole", tmp_path / "killed")
    )
    assert [step for step, split, _ in whole if split == "train"] == [1, 2, 3, 4, 5, 6]
    assert killed == whole
    assert steps_saved(tmp_path / "whole") == [2, 4, 6]
    assert [event["step"] for event in events(tmp_path / "whole", "checkpoint")] == [2, 4, 6]
    assert not list(tmp_path.glob("*/checkpoints/*/*.bin"))  # no pickle that anybody might load
    # On one rank, TRL would go on with other random numbers and other batches.
    with pytest.raises(CheckpointMismatch, match="ranks was 2 and is now 1"):
        fit(ADD, tmp_path / "whole", "train.steps=7")


def test_a_signal_saves_and_ends_with_75(tmp_path):
    launched = started(tmp_path / "run", *DPO, "checkpoint.keep=1")
    launched.send_signal(signal.SIGTERM)
    assert launched.wait(60) == 75
    (stopped,) = events(tmp_path / "run", "preempt")
    assert stopped["signal"] == "SIGTERM" and steps_saved(tmp_path / "run") == [stopped["step"]]
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    resume(tmp_path / "run", "ddp-2", f"train.steps={stopped['step'] + 1}").succeeded()
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, stopped["step"] + 2))


def test_trl_begins_with_the_weights_and_the_tokens_that_our_own_trainer_has(tmp_path):
    still = ["optimizer.lr=0.0", "train.eval_batches=1", *SHORT]
    for name in ("TRLSFT", "SFT"):
        fit(ADD, tmp_path / name, f"trainer=unitrain.rl:{name}", *still)
    ours, theirs = (metrics(tmp_path / name, "eval")[-1]["loss"] for name in ("SFT", "TRLSFT"))
    assert theirs == pytest.approx(ours, rel=1e-6)
    transformers = pytest.importorskip("transformers")
    saved = tmp_path / "TRLSFT" / "checkpoints" / "checkpoint-2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer("1+é=\n")["input_ids"] == list("1+é=\n".encode())
    assert tokenizer.decode(list("1+é=".encode())) == "1+é="
    fit(ADD, tmp_path / "next", "trainer=unitrain.rl:SFT", f"model={{name: hf, path: {saved}}}", *still)
    assert metrics(tmp_path / "next", "eval")[-1]["loss"] == ours  # the rate was 0


@pytest.mark.parametrize("task", [DPO, KTO], ids=["dpo", "kto"])
@pytest.mark.parametrize("lora", ["null", "{r: 2}"], ids=["all weights", "adapters"])
def test_preferences_are_learnt_from_the_first_weights_as_the_reference(task, lora, tmp_path):
    fit(ADD, tmp_path / "run", *task, *SHORT, f"model.lora={lora}", "optimizer.lr=1e-2")
    first, last = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.6931 if task is DPO else 0.5, abs=1e-3)
    assert last["loss"] != first["loss"]
    assert metrics(tmp_path / "run", "eval")[-1]["loss"] < first["loss"]
    fit(ADD, tmp_path / "run", *task, *SHORT, f"model.lora={lora}", "optimizer.lr=1e-2", "train.steps=3")
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3]


def test_arguments_of_trl_s_own_go_through_and_ours_are_refused(tmp_path):
    fit(ADD, tmp_path / "run", *DPO, *SHORT, "rl.trl={loss_type: [ipo], beta: 0.5}", "checkpoint.every=0")
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(1.0)  # (0 - 1 / (2 beta))^2
    assert steps_saved(tmp_path / "run") == []
    for override, message in (
        ("rl.trl={learning_rate: 1.0}", r"rl\.trl\.learning_rate is set by optimizer\.lr"),
        ("rl.trl={betta: 1.0}", "no argument of trl.DPOConfig, did you mean"),
        ("train.micro_batch=3", "which 1 ranks and micro-batches of 3 do not divide"),
        ("checkpoint.memory_every=1", "takes no snapshots"),
        ("guard.spike=3.0", "cannot roll back"),
    ):
        with pytest.raises(RecipeError, match=message):
            fit(ADD, tmp_path / "refused", *DPO, override)
    with pytest.raises(Refused, match="runs on single or ddp"):
        fit(ADD, tmp_path / "refused", *DPO, strategy="fsdp2")


def test_half_a_checkpoint_does_not_count_and_a_damaged_one_is_passed_over(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        folder = trl_folders.place(root, step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes([step]) * 100)
        if step < 6:
            assert trl_folders.seal(folder, step, {"ranks": 1}) == 100
    found, damaged = trl_folders.newest(root)
    assert found is not None and found.step == 4 and found.facts == {"ranks": 1} and not damaged
    damage(root / "checkpoint-4" / "model.safetensors")
    found, damaged = trl_folders.newest(root)
    assert found is not None and found.step == 2
    assert [(path.name, why) for path, why in damaged] == [("checkpoint-4", "model.safetensors has other contents")]
    trl_folders.clear(root, keep=1, newest=4)
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint-4", "checkpoint-6"]
