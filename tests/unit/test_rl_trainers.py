"""The trainers of RL and preferences on one rank: what they compute, what they refuse, and that they learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unitrain.data.records import RecordsData
from unitrain.errors import RecipeError, UserError
from unitrain.export.run import export
from unitrain.models.gpt_torch import logits_of
from unitrain.recipe_file import recipe_from_text
from unitrain.rl import DPO, GRPO, KTO, PPO, RLOO, SFT, ReinforcePP, RewardModel
from unitrain.rl.base import Base
from unitrain.rl.logprobs_torch import token_logprobs
from unitrain.rl.policy_torch import PolicyStepOut
from unitrain.rl.preferences_torch import kto_reference
from unitrain.rl.recipe import rl_recipe
from unitrain.rl.report import _samples_at, plot, table
from unitrain.rl.rewards import RewardFailed
from unitrain.rl.samples import collate
from unitrain.run import Run
from unitrain.trainer import Trainer

fast = pytest.mark.fast

LETTERS = """\
name: letters
trainer: unitrain.rl:GRPO
model: {name: gpt, layers: 1, width: 32, heads: 2, ffn: 32, max_len: 16}
data: {name: records, path: "unitrain.rl.examples:letters", seq_len: 10}
optimizer: {lr: 3e-3, clip: 1.0}
train: {steps: 3, global_batch: 4, log_every: 1, eval_every: 0}
strategy: {name: single}
rl:
  samples_per_prompt: 4
  sampling: {max_tokens: 4}
  reward: {function: "unitrain.rl.examples:vowels"}
"""
PAIRS = ['data.path="unitrain.rl.examples:addition_pairs"', "rl={}", "train.eval_every=3", "train.eval_batches=2"]


def trainer(kind: type[Trainer], folder: Path, *overrides: str) -> Any:
    name = f"trainer=unitrain.rl:{kind.__name__}"
    return kind(recipe_from_text(LETTERS, overrides=[name, *overrides]), run_dir=folder)


def records(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [record for record in Run(folder).metrics() if record["split"] == split]


# --- rewards


@fast
@pytest.mark.parametrize("kind", [GRPO, RLOO, ReinforcePP, PPO])
def test_the_first_update_finds_a_ratio_of_exactly_1_and_nothing_clipped(kind, tmp_path):
    run = trainer(kind, tmp_path / "run", "train.micro_batch=5", "rl.minibatches=2", "rl.epochs=2", "model.dropout=0.2")
    for out in run.steps():
        assert isinstance(out, PolicyStepOut)
        assert len(out.policy) == 4 and len(out.critic) == (4 if kind is PPO else 0)
        first = out.policy[0].read()
        assert (first["ratio"], first["approx_kl"], first["clip_fraction"]) == (1.0, 0.0, 0.0)
        assert out.policy[-1].read()["ratio"] != 1.0
        assert out.facts["gap"] < 1e-4


@fast
def test_metrics_of_every_step_are_written_and_a_table_and_a_plot_end_the_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    trainer(PPO, tmp_path / "run").fit()
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [1, 2, 3]
    assert [record["generated"] for record in found] == [16, 32, 48]
    wanted = {"reward", "kl", "kl_coef", "entropy", "length", "clip_fraction", "gap", "gap_max", "critic_loss"}
    assert wanted <= found[0].keys()
    assert found[0]["kl"] == 0 and found[2]["kl"] > 0
    assert "reward" in capsys.readouterr().out
    assert (tmp_path / "run" / "rl.png").stat().st_size > 1000


@fast
def test_the_reference_stays_what_the_run_began_with_and_is_in_no_checkpoint(tmp_path):
    run = trainer(GRPO, tmp_path / "run", "checkpoint.every=3")
    digests = []
    for _ in run.steps():
        digests.append((run.engines["model"].digest(), run.engines["reference"].digest()))
    assert len({str(reference) for _, reference in digests}) == 1
    assert len({str(policy) for policy, _ in digests}) == 3
    base = Base(str(tmp_path / "run"), "rl.base")
    assert {tensor.role for tensor in base.reader.manifest.tensors} == {"model"}


@fast
def test_a_run_begins_with_the_weights_of_another(tmp_path):
    trainer(SFT, tmp_path / "base", 'data.path="unitrain.rl.examples:addition"').fit()
    run = trainer(PPO, tmp_path / "run", f"rl.base={tmp_path / 'base'}")
    next(steps := run.steps())
    base, reference = Base(str(tmp_path / "base"), "rl.base"), dict(run.engines["reference"].model.named_parameters())
    for name, parameter in reference.items():
        np.testing.assert_array_equal(parameter.detach().numpy(), base.value(name, tuple(parameter.shape)))
    steps.close()
    with pytest.raises(RecipeError, match="neither a run's folder nor a checkpoint"):
        next(trainer(GRPO, tmp_path / "other", "rl.base=nowhere").steps())


@fast
def test_the_recorded_log_probabilities_are_those_of_the_training_forward_pass(tmp_path):
    run = trainer(GRPO, tmp_path / "run", "rl.sampling.temperature=0.7", "train.steps=1")
    seen = {}

    def learn(step, samples, control):
        arrays = collate(samples)
        tensors = {name: torch.from_numpy(arrays[name]) for name in ("tokens", "targets", "mask")}
        with torch.no_grad():
            logits = logits_of(run.engines["model"].model(tensors["tokens"]))
        found, _ = token_logprobs(logits, tensors["targets"], temperature=0.7, mask=tensors["mask"])
        seen["far"] = float(np.abs(found.numpy() - arrays["rollout"])[arrays["mask"]].max())
        return type(run).learn(run, step, samples, control)

    run.learn = learn
    run.fit()
    assert seen["far"] < 1e-4


@fast
def test_a_penalty_in_the_reward_and_an_adaptive_coefficient_hold_the_policy(tmp_path):
    changes = ["train.steps=12", "rl.sampling.max_tokens=8", "optimizer.lr=1e-2"]
    kl = {}
    for name, value in (("free", "{coef: 0.0}"), ("held", "{where: reward, estimator: k1, coef: 1.0}")):
        trainer(RLOO, tmp_path / name, *changes, f"rl.kl={value}").fit()
        kl[name] = records(tmp_path / name)[-1]["kl"]
    assert kl["held"] < kl["free"] / 2
    adaptive = "rl.kl={where: reward, estimator: k1, coef: 0.1, target: 1e-6, horizon: 32}"
    run = trainer(RLOO, tmp_path / "adaptive", adaptive, "rl.samples_per_prompt=8")
    run.fit()
    coefficients = [record["kl_coef"] for record in records(tmp_path / "adaptive")]
    # The first step sees a KL of 0, which is below the target.
    assert coefficients == pytest.approx([0.1, 0.08, 0.096])
    assert run.extra["rl"]["kl"]["coef"] == pytest.approx(0.096 * 1.2)
    assert run.extra["rl"]["version"] == 3


def broken(completion):
    raise ValueError("no such thing")


@fast
def test_a_reward_that_fails_is_named_and_a_few_failures_may_be_allowed(tmp_path):
    failing = f"rl.reward={{function: '{__name__}:broken', retries: 0}}"
    with pytest.raises(RewardFailed, match=r"'broken' .*no such thing.* on step 0, prompt \d+, sample 0"):
        trainer(GRPO, tmp_path / "run", failing).fit()


@fast
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.reward={}", "names no function and no model"),
        ("rl.sampling.temperature=0", "explores nothing"),
        ("rl.advantage={name: gae}", "needs a critic"),
        ("rl.advantage={name: grpo, options: {scales: group}}", "has no option 'scales'"),
        ("rl.aggregate=tokens", "rl.aggregate is 'tokens'"),
        ("rl.samples=3", "rl.samples"),
    ],
)
def test_mistakes_in_the_recipe_are_told(override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer(GRPO, tmp_path / "run", override).fit()


@fast
def test_a_function_named_anew_begins_without_the_options_of_the_default():
    defaults = {"loss": {"name": "ppo", "options": {"clip_low": 0.1}}, "epochs": 3}
    assert rl_recipe({"loss": {"options": {"clip_high": 0.3}}}, defaults).loss.options == {
        "clip_low": 0.1,
        "clip_high": 0.3,
    }
    found = rl_recipe({"loss": {"name": "gspo"}}, defaults)
    assert (found.loss.name, dict(found.loss.options), found.epochs) == ("gspo", {}, 3)


# --- supervised and preferences


@fast
def test_sft_learns_completions_and_not_prompts():
    source = RecordsData(path="unitrain.rl.examples:addition", seq_len=10).open("train")
    assert source is not None
    arrays = source.fetch(np.array([0]))
    weighed = arrays["targets"][0][arrays["weight"][0] > 0]
    assert source.decode(weighed) == f"{source.rows[0]['answer']}\n"
    assert source.stop == (10,)


@fast
@pytest.mark.parametrize("loss", ["dpo", "cdpo", "ipo"])
def test_preferences_are_learnt_from_pairs(loss, tmp_path):
    run = trainer(DPO, tmp_path / "run", *PAIRS, f"rl.loss.name={loss}", "train.steps=15", "train.global_batch=32")
    run.fit()
    found = records(tmp_path / "run")
    first = {"dpo": np.log(2), "cdpo": np.log(2), "ipo": 25.0}[loss]  # (1 / (2 x 0.1))^2: nothing is preferred yet
    assert found[0]["loss"] == pytest.approx(first, rel=1e-6) and found[0]["margin"] == 0
    assert found[-1]["loss"] < first and found[-1]["margin"] > 0
    assert records(tmp_path / "run", "eval")[-1]["accuracy"] > 0


@fast
def test_kto_compares_with_the_kl_of_the_whole_batch(tmp_path):
    data = ['data.path="unitrain.rl.examples:addition_labels"', "rl={}", "train.steps=30", "train.global_batch=16"]
    run = trainer(KTO, tmp_path / "run", *data, "train.micro_batch=3")
    whole = trainer(KTO, tmp_path / "whole", *data)
    for each in (run, whole):
        each.fit()
    cut, uncut = (records(tmp_path / name) for name in ("run", "whole"))
    assert cut[0]["loss"] == pytest.approx(0.5)
    assert [record["loss"] for record in cut] == pytest.approx([record["loss"] for record in uncut], rel=1e-5)
    assert cut[-1]["signed_reward"] > 0
    assert kto_reference(torch.ones(2), torch.zeros(2)).sum == 2


def test_a_reward_model_learns_to_prefer_and_then_scores_a_policy(tmp_path):
    rows = [{"prompt": chr(97 + n), "chosen": "aeiou"[n % 5] * 3, "rejected": "klmnp"[n % 5] * 3} for n in range(26)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [*PAIRS, f"data.path={tmp_path / 'pairs.jsonl'}", "data.eval_fraction=0.2"]
    trainer(RewardModel, tmp_path / "judge", *pairs, "train.steps=20", "train.global_batch=16").fit()
    found = records(tmp_path / "judge")
    assert found[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert found[-1]["loss"] < 0.6 and records(tmp_path / "judge", "eval")[-1]["accuracy"] == 1
    exported = export(Run(tmp_path / "judge"), tmp_path / "exported")
    assert exported.what == "weights under unitrain's own names"  # no language model: it has one output
    policy = trainer(PPO, tmp_path / "policy", f"rl.reward={{model: {tmp_path / 'judge'}}}")
    policy.fit()
    assert set(policy.engines) == {"model", "reference", "critic", "reward"}
    assert all(np.isfinite(record["reward"]) for record in records(tmp_path / "policy"))


LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", [PPO, DPO, RewardModel])
def test_models_of_transformers_are_trained_with_and_without_adapters(kind, lora, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    model = f"model={json.dumps({'name': 'hf', 'config': LLAMA, 'lora': {'r': 2} if lora else None})}"
    changes = [model] if kind is PPO else [model, *PAIRS]
    run = trainer(kind, tmp_path / "run", *changes)
    run.fit()
    names = {tensor.name for tensor in Base(str(tmp_path / "run"), "rl.base").reader.manifest.tensors}
    assert not lora or all(".lora_" in name or name.endswith("lm_head.weight") for name in names)
    first, last = records(tmp_path / "run")[0], records(tmp_path / "run")[-1]
    assert last["loss"] != first["loss"]
    if kind is PPO:
        assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 0


# --- the report


@fast
def test_a_table_shows_the_way_from_first_to_last_and_nothing_without_rewards(tmp_path):
    found: list[dict[str, Any]] = [
        {"step": step, "split": "train", "reward": step / 100, "kl": 0.1, "length": 4.0, "generated": 256.0 * step}
        for step in range(1, 101)
    ]
    found.append({"step": 50, "split": "eval", "reward": 0.77})
    lines = table(found).splitlines()
    assert len(lines) == 9 and lines[-1].split() == ["100", "25.6k", "1.0000", "0.1000", "4.0000", "0.7700"]
    assert table([{"step": 1, "split": "train", "loss": 1.0}]) == ""
    pytest.importorskip("matplotlib")
    plot(tmp_path / "rl.png", "letters", found)
    assert (tmp_path / "rl.png").read_bytes().startswith(b"\x89PNG")


@fast
def test_preferences_are_evaluated_on_answers_of_the_policy_and_end_with_a_table_and_a_plot(tmp_path, capsys):
    reward = ["rl.reward.function=unitrain.rl.examples:exact_match", "rl.sampling.max_tokens=4"]
    still = [*PAIRS, *reward, "optimizer.lr=0.0", "model.max_len=20", "data.seq_len=20"]
    found = trainer(DPO, tmp_path / "still", *still).fit()
    assert found.evaluation["kl"] == pytest.approx(0, abs=1e-6)  # it is its reference
    assert 0 < found.evaluation["entropy"] <= np.log(256)
    found = trainer(DPO, tmp_path / "run", *still, "optimizer.lr=1e-2").fit()
    assert found.evaluation["kl"] > 1e-4
    printed = capsys.readouterr().out
    assert "held-out kl" in printed and "margin" in printed
    assert (tmp_path / "run" / "rl.png").stat().st_size > 10_000 or "no plot" in printed


@fast
def test_an_evaluation_between_two_lines_is_drawn_where_it_was():
    assert _samples_at({10: 640, 20: 1280}, 25) == 1600
    assert _samples_at({1: 256}, 1) == 256
