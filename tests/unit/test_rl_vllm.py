"""vLLM as a rollout engine, over a stand-in for it: weights in, tokens and log-probabilities out, and refusals."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unitrain.errors import MissingExtra, RecipeError, UnitrainError
from unitrain.models.config import GPT
from unitrain.models.gpt_torch import logits_of
from unitrain.models.hf_config import HF, LoRA
from unitrain.recipe_file import recipe_from_text
from unitrain.registry import resolve
from unitrain.rl.logprobs_torch import token_logprobs
from unitrain.rl.prompts import asked
from unitrain.rl.recipe import check_rl
from unitrain.rl.rollout_worker import RolloutWorker
from unitrain.rl.sampler import Plan, Tensor
from unitrain.rl.sampler_torch import as_numpy, held
from unitrain.rl.sampling import Sampling

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore")]  # of libraries among themselves
pytest.importorskip("transformers", reason="not run: transformers is not installed")

STANDINS = Path(__file__).parents[1] / "fixtures" / "rl" / "standins"
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 32}
MODELS = {
    "llama": HF(config=LLAMA),
    "tied": HF(config=LLAMA | {"tie_word_embeddings": True}),
    "adapters": HF(config=LLAMA, lora=LoRA(r=2, alpha=8.0, target_modules="all-linear")),
    "transposed": HF(
        config={"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 40}
        | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0},
        lora=LoRA(r=2, target_modules=("c_attn",)),
    ),
}
PROMPTS = [np.array([3, 5, 7]), np.array([11])]


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(STANDINS)
    yield
    sys.modules.pop("vllm", None)


def policy(config: HF, seed: int) -> Any:
    torch.manual_seed(seed)
    model = resolve(config.modules["torch"])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def tensors(model: Any, *, moving: bool | None = None) -> dict[str, Tensor]:
    chosen = {name: each for name, each in held(model).items() if moving is None or each.requires_grad is moving}
    return {name: Tensor(str(as_numpy(each).dtype), as_numpy(each)) for name, each in chosen.items()}


def plan(config: Any, **options: Any) -> Plan:
    model = functools.partial(resolve(config.modules["torch"]), config)
    return Plan(model=model, config=config, precision="fp32", run_seed=1, gpu=False, options=options)


@pytest.mark.usefixtures("standin")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_samples_come_with_the_log_probabilities_of_the_weights_that_were_sent(name: str, temperature: float) -> None:
    config, sampling = MODELS[name], Sampling(max_tokens=6, temperature=temperature, stop=(4,))
    worker = RolloutWorker("vllm", plan(config))
    for version in (1, 2):
        model = policy(config, version)
        parts = [tensors(model)] if version == 1 or config.lora is None else [tensors(model, moving=True)]
        if version == 2 and config.lora is not None:  # only adapters move
            frozen = policy(config, 1)
            own = dict(frozen.named_parameters())
            with torch.no_grad():
                for each, parameter in model.named_parameters():
                    if not parameter.requires_grad:
                        parameter.copy_(own[each])
        digests = worker.load(version, *parts)
        assert digests.keys() == tensors(model).keys()
        found = worker.generate(version, asked(0, np.array([0, 1]), 3), PROMPTS, sampling)
        assert found.lengths.max() > 1
        for row in range(6):
            length, prompt = int(found.lengths[row]), PROMPTS[row // 3]
            answer = found.tokens[row, :length]
            whole = torch.from_numpy(np.concatenate((prompt, answer)))
            with torch.no_grad():
                logits = logits_of(model(whole[None, :-1]))[0, len(prompt) - 1 :]
            expected, _ = token_logprobs(logits, whole[len(prompt) :], temperature=sampling.scale)
            np.testing.assert_allclose(found.logprobs[row, :length], expected.numpy(), atol=1e-4)
            assert bool(found.ended[row]) == (answer[-1] == 4)
        again = worker.generate(version, asked(0, np.array([0, 1]), 3), PROMPTS, sampling)
        assert np.array_equal(again.tokens, found.tokens)


@pytest.mark.usefixtures("standin")
def test_weights_that_arrive_otherwise_are_an_error_and_the_cache_of_the_old_ones_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unitrain.rl.vllm_torch import Receiver, VLLMSampler

    sampler = VLLMSampler(plan(MODELS["llama"], gpu_memory_utilization=0.5))
    sampler.load(tensors(policy(MODELS["llama"], 1)))
    assert sampler._llm.resets == 1
    monkeypatch.setattr(Receiver, "take_weights", lambda self, sent: [0 for _ in sent])
    with pytest.raises(UnitrainError, match="received other weights"):
        sampler.load(tensors(policy(MODELS["llama"], 2)))


def test_what_vllm_cannot_do_is_told() -> None:
    with pytest.raises(RecipeError, match=r"give model: \{name: hf\}"):
        RolloutWorker("vllm", plan(GPT(layers=1, width=8, heads=1, vocab_size=9, max_len=8)))
    with pytest.raises(RecipeError, match=r"rl\.rollout\.options\.load_format is set"):
        RolloutWorker("vllm", plan(MODELS["llama"], load_format="auto"))
    with pytest.raises(MissingExtra, match=r"needs vllm: pip install 'unitrain\[vllm\]'"):
        RolloutWorker("vllm", plan(MODELS["llama"]))


def test_the_recipe_is_refused_before_anything_starts() -> None:
    text = "name: a\ntrainer: unitrain.rl:GRPO\nmodel: {name: hf, config: {model_type: llama}}\ntrain: {steps: 1}\n"
    rollout = ["rl.reward.function=a:b", "rl.rollout={engine: vllm, actors: 1}"]
    with pytest.raises(RecipeError, match=r"give model: \{name: hf\}, or engine own"):
        check_rl(recipe_from_text(text, overrides=[*rollout, "model={name: gpt}"]))
    with pytest.raises(RecipeError, match="of the restricted draw"):
        check_rl(recipe_from_text(text, overrides=[*rollout, "rl.sampling.top_p=0.9"]))


@pytest.mark.usefixtures("standin")
def test_restricted_draws_are_refused() -> None:
    worker = RolloutWorker("vllm", plan(MODELS["llama"]))
    worker.load(1, tensors(policy(MODELS["llama"], 1)))
    restricted = dataclasses.replace(Sampling(), top_k=3)
    with pytest.raises(RecipeError, match="of the restricted draw"):
        worker.generate(1, asked(0, np.array([0]), 1), PROMPTS[:1], restricted)
