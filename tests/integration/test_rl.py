"""RL runs as users start them: they learn, resume bit by bit, and do not depend on the number of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unitrain.errors import CheckpointMismatch
from unitrain.recipe_file import load_recipe, to_yaml

from .runs import COMMAND, checkpoints, events, fit, launch, metrics, resume

RECIPES = Path(__file__).parents[2] / "recipes"
FACTS = ("reward", "kl", "entropy", "length", "loss", "kl_coef", "gap", "grad_norm")

LETTERS = """\
name: letters
trainer: unitrain.rl:PPO
model: {name: gpt, layers: 1, width: 32, heads: 2, ffn: 32, max_len: 16}
data: {name: records, path: "unitrain.rl.examples:letters", seq_len: 10}
optimizer: {lr: 3e-3, clip: 1.0}
train: {steps: 8, global_batch: 7, micro_batch: 5, log_every: 1, eval_every: 0}
rl:
  samples_per_prompt: 3
  epochs: 2
  minibatches: 2
  sampling: {max_tokens: 4}
  reward: {function: "unitrain.rl.examples:vowels"}
  kl: {coef: 0.1, target: 0.01, horizon: 50}
checkpoint: {every: 3}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that adds two numbers rightly about every third time."""
    folder = tmp_path_factory.mktemp("rl") / "base"
    fit(to_yaml(load_recipe(RECIPES / "rl_add_sft.yaml")), folder, "train.eval_every=null")
    return folder


def greedy(folder: Path) -> float:
    """The mean reward of the last evaluation."""
    return float(metrics(folder, "eval")[-1]["reward"])


@pytest.mark.timeout(600)
def test_rewards_teach_addition_and_shuffled_rewards_teach_nothing(base, full_drills, tmp_path):
    """25 steps of GRPO with one seed; in full, 150 steps of GRPO and PPO with three."""
    before = greedy(base)
    assert 0.2 <= before <= 0.7
    steps, seeds = (150, (1, 2, 3)) if full_drills else (25, (1,))
    for seed in seeds:
        given = [f"rl.base={base}", f"train.steps={steps}", f"train.seed={seed}"]
        recipe = to_yaml(load_recipe(RECIPES / "rl_add_grpo.yaml", given))
        fit(recipe, tmp_path / f"grpo-{seed}")
        assert greedy(tmp_path / f"grpo-{seed}") >= (0.85 if full_drills else before + 0.15)
        fit(recipe, tmp_path / f"shuffled-{seed}", "rl.advantage={name: 'unitrain.rl.examples:shuffled'}")
        assert greedy(tmp_path / f"shuffled-{seed}") < before
        if full_drills:
            fit(to_yaml(load_recipe(RECIPES / "rl_add_ppo.yaml", given)), tmp_path / f"ppo-{seed}")
            assert greedy(tmp_path / f"ppo-{seed}") >= 0.9


def test_without_kl_the_learned_reward_rises_while_the_true_one_falls(full_drills, tmp_path):
    if not full_drills:
        pytest.skip("not run: takes five minutes; `make drills` does it")
    base, reward = f"rl.base={tmp_path / 'base'}", f"rl.reward.model={tmp_path / 'reward'}"
    fit((RECIPES / "gpt_tiny.yaml").read_text(), tmp_path / "base")
    fit((RECIPES / "rl_text_reward.yaml").read_text(), tmp_path / "reward", base)
    ends = {}
    for coef in ("0.0", "0.1"):
        fit((RECIPES / "rl_text.yaml").read_text(), tmp_path / coef, base, reward, f"rl.kl.coef={coef}")
        records = metrics(tmp_path / coef)
        learned, true = ([each[name] for each in records] for name in ("reward/model", "reward/true_reward"))
        assert sum(learned[-5:]) / 5 > max(learned) - 0.4
        ends[coef] = (max(true), sum(true[-5:]) / 5)
    assert ends["0.0"][1] < ends["0.0"][0] - 0.2 and ends["0.0"][1] < ends["0.1"][1] - 0.1


@pytest.mark.parametrize("kind", ["GRPO", "PPO"])
def test_how_a_batch_is_cut_into_parts_changes_no_number(kind, tmp_path):
    """Nothing divides anything: 7 prompts, 3 samples each, two updates of 10 and 11 rows."""
    recipe = [f"trainer=unitrain.rl:{kind}", "rl.kl={}", "rl.kl.coef=0.1", "train.steps=3", "checkpoint.every=0"]
    runs = {}
    for micro in (1, 2, 3, 20, "null"):
        fit(LETTERS, tmp_path / f"{micro}", f"train.micro_batch={micro}", *recipe)
        runs[micro] = metrics(tmp_path / f"{micro}")
    for micro, records in runs.items():
        for record, whole in zip(records, runs["null"], strict=True):
            for name in ("reward", "kl", "entropy", "loss", "grad_norm"):
                assert record[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-5), (micro, record["step"], name)


@pytest.mark.parametrize(
    ("shape", "strategies"), [("ddp-2", "{}"), ("fsdp2-2", "{}"), ("ddp-2", "{reference: fsdp2, critic: zero2}")]
)
def test_two_ranks_learn_what_one_learns(shape, strategies, tmp_path):
    fit(LETTERS, tmp_path / "one", "checkpoint.every=0")
    launch(LETTERS, tmp_path / "two", shape, "checkpoint.every=0", f"rl.strategies={strategies}").succeeded()
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("reward", "length", "kl", "entropy", "loss", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (one["step"], name)


def test_a_killed_run_goes_on_bit_by_bit(tmp_path):
    launch(LETTERS, tmp_path / "whole", "ddp-2").succeeded()
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(LETTERS)
    shape = ["--strategy", "ddp", "--nproc", "2", "--run-dir", tmp_path / "killed"]
    command = [COMMAND, "launch", recipe, *shape, "train.steps=1000", "recovery.restarts=0"]
    launched = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ, process_group=0
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed" / "checkpoints").exists() or not checkpoints(tmp_path / "killed"):
            assert time.monotonic() < deadline and launched.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(launched.pid, signal.SIGKILL)
        launched.wait()
    wait_for_ranks(tmp_path / "killed")
    for found in checkpoints(tmp_path / "killed")[1:]:
        found.joinpath("MANIFEST.json").unlink()  # go on from the first, whatever came later
    resume(tmp_path / "killed", "ddp-2", "train.steps=8").succeeded()
    assert len(events(tmp_path / "killed", "start")) == 2
    whole, killed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert [record["step"] for record in killed] == list(range(1, 9))
    assert [[record[name] for name in FACTS] for record in killed] == [
        [record[name] for name in FACTS] for record in whole
    ]


def wait_for_ranks(folder: Path) -> None:
    """Until no process has the run's folder on its command line: a killed agent's ranks end by themselves."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if not any(str(folder) in line and sys.executable in line for line in listed.splitlines()):
            return
        time.sleep(0.2)


def test_a_run_is_not_resumed_from_another_base(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        fit(LETTERS, tmp_path / name, f"train.seed={seed}", "train.steps=1")
    fit(LETTERS, tmp_path / "run", f"rl.base={tmp_path / 'one'}", "train.steps=1")
    with pytest.raises(CheckpointMismatch, match=r"rl\.base was"):
        fit(LETTERS, tmp_path / "run", f"rl.base={tmp_path / 'two'}", "train.steps=2")
