"""Generation: parity with the training forward pass, padding, seeds, and how tokens are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from unitrain.errors import RecipeError, UserError
from unitrain.models.config import GPT
from unitrain.models.gpt_torch import GPTModule, logits_of
from unitrain.rl import generate_torch
from unitrain.rl.generate_torch import Response, drawn, generate
from unitrain.rl.kl_torch import kl_loss
from unitrain.rl.logprobs_torch import token_logprobs
from unitrain.rl.policy_losses_torch import Tokens, policy_loss
from unitrain.rl.samples import Sample, collate, seed_of
from unitrain.rl.sampling import Sampling

fast = pytest.mark.fast  # all but those of transformers, whose import takes seconds

VOCAB = 23
PROMPTS = [np.arange(1, 1 + length) % VOCAB for length in (3, 7, 1, 5)]
SEEDS = np.array([seed_of(0, 0, prompt, 0) for prompt in range(len(PROMPTS))], dtype=np.uint64)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", **SIZES, "vocab_size": VOCAB, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}


def gpt(*, tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = GPT(layers=2, width=32, heads=4, ffn=48, vocab_size=VOCAB, max_len=32, tied=tied, dropout=0.3)
    model = GPTModule(config)
    with torch.no_grad():
        model.embed.weight.mul_(0.3)  # else the likeliest token has all the probability
    return model


def wrapped() -> nn.Module:
    """A model that generation knows nothing of."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(tokens)
            return logits

    return Other()


def transformers_model(values: dict[str, Any], *, lora: bool = False) -> nn.Module:
    pytest.importorskip("transformers")
    if lora:
        pytest.importorskip("peft")
    from unitrain.models.hf_config import HF, LoRA
    from unitrain.models.hf_torch import build

    torch.manual_seed(0)
    config = HF(config={**values, "initializer_range": 0.3}, lora=LoRA(r=2) if lora else None)
    model: nn.Module = build(config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # begins at zero, where an adapter does nothing
            nn.init.normal_(parameter, std=0.3)
    return model


OURS = ("gpt", "gpt untied", "wrapped")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": gpt,
    "gpt untied": lambda: gpt(tied=False),
    "wrapped": wrapped,
    "llama": lambda: transformers_model(LLAMA),
    "gpt2": lambda: transformers_model(GPT2),
    "llama with lora": lambda: transformers_model(LLAMA, lora=True),
}

each_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=fast if name in OURS else ()) for name in MODELS]
)


def as_samples(responses: Sequence[Response], prompts: Sequence[NDArray[np.int64]] = PROMPTS) -> list[Sample]:
    return [
        Sample(
            step=0,
            place=row,
            prompt=row,
            index=0,
            version=0,
            prompt_tokens=prompts[row],
            tokens=response.tokens,
            ended=response.ended,
            logprobs=response.logprobs,
            reward=float(row),
        )
        for row, response in enumerate(responses)
    ]


def trained_logprobs(model: nn.Module, arrays: dict[str, NDArray[Any]], scale: float) -> torch.Tensor:
    """As training computes them: one forward pass over padded rows."""
    model.eval()
    logits = logits_of(model(torch.from_numpy(arrays["tokens"])))
    targets, mask = torch.from_numpy(arrays["targets"]), torch.from_numpy(arrays["mask"])
    return token_logprobs(logits, targets, temperature=scale, mask=mask)[0]


@each_model
@pytest.mark.parametrize("sampling", [Sampling(max_tokens=9), Sampling(max_tokens=9, temperature=0.7, stop=(5, 6, 7))])
def test_generation_and_training_agree_on_log_probabilities(name: str, sampling: Sampling) -> None:
    model = MODELS[name]()
    responses = generate(model, PROMPTS, SEEDS, sampling)
    assert model.training  # as it was before
    arrays = collate(as_samples(responses))
    with torch.no_grad():
        trainer = trained_logprobs(model, arrays, sampling.scale).numpy()
    assert arrays["mask"].sum() == sum(len(response.tokens) for response in responses)
    assert np.abs(trainer - arrays["rollout"]).max() < 1e-4
    assert arrays["rollout"].std() > 0.1


@each_model
def test_greedy_responses_are_the_likeliest_tokens_of_the_whole_forward_pass(name: str) -> None:
    model = MODELS[name]()
    sampling = Sampling(max_tokens=6, temperature=0)
    for prompt, response in zip(PROMPTS, generate(model, PROMPTS, SEEDS, sampling), strict=True):
        tokens = torch.tensor([[*prompt, *response.tokens]])
        model.eval()
        with torch.no_grad():
            logits = logits_of(model(tokens))[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == response.tokens.tolist()
        chances = logits.log_softmax(-1)[range(len(prompt) - 1, len(tokens[0]) - 1), response.tokens]
        np.testing.assert_allclose(response.logprobs, chances.numpy(), atol=1e-4)


@each_model
def test_a_sample_depends_on_no_other_prompt_of_the_call(name: str) -> None:
    """Neither on their lengths, which pad it, nor on its place among them."""
    model, sampling = MODELS[name](), Sampling(max_tokens=8, stop=(5, 6))
    together = generate(model, PROMPTS, SEEDS, sampling)
    backwards = generate(model, PROMPTS[::-1], SEEDS[::-1].copy(), sampling)[::-1]
    alone = [generate(model, [PROMPTS[row]], SEEDS[[row]], sampling)[0] for row in range(len(PROMPTS))]
    for one, two, three in zip(together, backwards, alone, strict=True):
        assert one.tokens.tolist() == two.tokens.tolist() == three.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, three.logprobs, atol=1e-4)
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)


@fast
def test_the_same_call_gives_the_same_bits_and_other_seeds_other_samples() -> None:
    model, sampling = gpt(), Sampling(max_tokens=12)
    one, two = (generate(model, PROMPTS, SEEDS, sampling) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        assert first.tokens.tobytes() == second.tokens.tobytes()
        assert first.logprobs.tobytes() == second.logprobs.tobytes()
    other = generate(model, PROMPTS, SEEDS + np.uint64(1), sampling)
    assert [each.tokens.tolist() for each in one] != [each.tokens.tolist() for each in other]


@fast
def test_a_response_ends_with_its_stop_token_or_is_cut() -> None:
    model, stop = gpt(), (2, 3, 4, 5, 6, 7)
    free = generate(model, PROMPTS * 4, np.arange(16, dtype=np.uint64), Sampling(max_tokens=6))
    stopped = generate(model, PROMPTS * 4, np.arange(16, dtype=np.uint64), Sampling(max_tokens=6, stop=stop))
    assert not any(each.ended for each in free)
    assert {each.ended for each in stopped} == {True, False}
    for whole, cut in zip(free, stopped, strict=True):
        places = [place for place, token in enumerate(whole.tokens.tolist()) if token in stop]
        length = places[0] + 1 if places else 6
        assert cut.tokens.tolist() == whole.tokens[:length].tolist()
        assert cut.ended == bool(places)
        assert len(cut.logprobs) == length


@fast
def test_run_on_makes_the_same_responses_by_as_many_passes_on_every_rank() -> None:
    model, sampling = wrapped(), Sampling(max_tokens=8, stop=tuple(range(VOCAB)))
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    short = generate(model, PROMPTS, SEEDS, sampling)
    assert len(passes) == 1
    passes.clear()
    long = generate(model, PROMPTS, SEEDS, sampling, True)
    assert len(passes) == 8
    assert [each.tokens.tolist() for each in short] == [each.tokens.tolist() for each in long]


def test_our_gpt_and_models_of_transformers_use_a_cache_and_sharded_ones_do_not() -> None:
    def way(model: nn.Module) -> str:
        return type(generate_torch._steps(model, PROMPTS, 4, torch.device("cpu"))).__name__

    class FSDPGPTModule(GPTModule):  # what fully_shard makes of its class
        pass

    assert way(gpt()) == "_CachedGPT"
    assert way(transformers_model(GPT2)) == "_CachedTransformers"
    assert way(wrapped()) == "_Whole"
    sharded = gpt()
    sharded.__class__ = FSDPGPTModule
    assert way(sharded) == "_Whole"


@fast
def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    draws = torch.arange(0.5, 10000) / 10000
    rows = logits.expand(len(draws), -1)

    def shares(**options: Any) -> list[float]:
        found = drawn(rows, draws.double(), Sampling(**options))
        return (torch.bincount(found, minlength=5) / len(draws)).tolist()

    chances = logits.softmax(0)
    assert shares() == pytest.approx(chances.tolist(), abs=1e-4)
    assert shares(temperature=0.5) == pytest.approx((2 * logits).softmax(0).tolist(), abs=1e-4)
    assert shares(temperature=0) == [1, 0, 0, 0, 0]
    two = (chances[:2] / chances[:2].sum()).tolist()
    assert shares(top_k=2) == pytest.approx([*two, 0, 0, 0], abs=1e-4)
    assert shares(top_k=9) == pytest.approx(chances.tolist(), abs=1e-4)
    assert shares(top_p=float(chances[0]) + 0.01) == pytest.approx([*two, 0, 0, 0], abs=1e-4)
    assert shares(top_p=float(chances[0]) - 0.01) == [1, 0, 0, 0, 0]
    assert shares(top_k=3, top_p=0.01) == [1, 0, 0, 0, 0]


@fast
def test_a_draw_next_to_one_never_takes_what_has_no_chance() -> None:
    logits = torch.full((1, 50), 0.1)
    logits[0, 30:] = -torch.inf
    almost = torch.tensor([1 - 2.0**-53]).double()
    assert drawn(logits, almost, Sampling()).item() == 29
    assert drawn(logits, torch.zeros(1).double(), Sampling()).item() == 0


@fast
def test_the_first_update_begins_at_ratio_one_with_the_mean_advantage_as_its_loss() -> None:
    """Bitwise: the old log-probabilities come from the very forward pass that training makes."""
    model = gpt()
    arrays = collate(as_samples(generate(model, PROMPTS, SEEDS, Sampling(max_tokens=6, stop=(5,)))))
    mask = torch.from_numpy(arrays["mask"])
    with torch.no_grad():
        old = trained_logprobs(model, arrays, 1.0)
    logprobs = trained_logprobs(model, arrays, 1.0)
    advantages = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    tokens = Tokens(logprobs, old, advantages, mask)
    for name in ("ppo", "gspo"):
        loss = policy_loss(name, tokens)
        assert torch.equal(tokens.ratio()[mask], torch.ones(int(mask.sum())))
        assert float(loss.sum.detach()) == pytest.approx(-float(advantages[mask].sum()), abs=1e-5)
        metrics = {key: float(total / weight) for key, (total, weight) in loss.metrics.items()}
        assert metrics == {"ratio": 1.0, "approx_kl": 0.0, "clip_fraction": 0.0}
        (gradient,) = torch.autograd.grad(loss.sum, logprobs, retain_graph=True)
        torch.testing.assert_close(gradient, torch.where(mask, -advantages, 0))
    for estimator in ("k1", "k2", "k3"):
        assert float(kl_loss(estimator, logprobs, old, mask).sum.detach()) == 0


@fast
def test_what_cannot_be_generated_is_refused() -> None:
    with pytest.raises(UserError, match=r"prompt of 7 tokens and a response of up to 27 need 33 in a row.* is 32"):
        generate(gpt(), PROMPTS, SEEDS, Sampling(max_tokens=27))
    with pytest.raises(UserError, match="empty prompt"):
        generate(gpt(), [np.array([], dtype=np.int64)], SEEDS[:1], Sampling())
    for wrong in ({"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"temperature": -1}, {"max_tokens": 0}):
        with pytest.raises(RecipeError, match=rf"sampling\.{next(iter(wrong))}"):
            Sampling(**wrong)  # type: ignore[arg-type]
