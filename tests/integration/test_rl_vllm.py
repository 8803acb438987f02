"""A run whose actors generate with vLLM, or with what stands in for it: the weights arrive, and both sides agree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .runs import metrics, unitrain

pytest.importorskip("ray", reason="not run: Ray is not installed")
pytest.importorskip("transformers", reason="not run: transformers is not installed")

ROOT = Path(__file__).parents[2]
STANDINS = ROOT / "tests" / "fixtures" / "rl" / "standins"

LETTERS = """\
name: letters
trainer: unitrain.rl:GRPO
model:
  name: hf
  config: {model_type: llama, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
           vocab_size: 256, max_position_embeddings: 32}
  lora: {r: 2, target_modules: all-linear}
data: {name: records, path: "unitrain.rl.examples:letters", seq_len: 10}
optimizer: {lr: 1e-2, clip: 1.0}
train: {steps: 4, global_batch: 4, log_every: 1, eval_every: 0}
rl:
  samples_per_prompt: 8
  sampling: {max_tokens: 4, temperature: 0.8}
  reward: {function: "unitrain.rl.examples:vowels"}
  rollout: {engine: vllm, actors: 1}
checkpoint: {every: 0}
"""


def test_what_vllm_draws_has_the_log_probabilities_that_the_trainer_computes(tmp_path):
    path = os.pathsep.join([str(STANDINS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    recipe = tmp_path / "letters.yaml"
    recipe.write_text(LETTERS)
    shape = ["--strategy", "ddp", "--nproc", "2", "--run-dir", tmp_path / "run"]
    unitrain("launch", recipe, *shape, cwd=tmp_path, PYTHONPATH=path).succeeded()
    records = metrics(tmp_path / "run")
    assert len(records) == 4 and max(record["gap"] for record in records) < 1e-5
    assert records[-1]["kl"] > 0  # adapters have moved, and what was drawn last knew it
