"""Draw responses from a policy: many prompts at once, each sample with random numbers of its own.

A sample's random numbers are a function of its seed and the position alone, so that it depends neither on the other
prompts of the call nor on who generates it. Only its logits do, in their last bits: the same call gives the same bits.

Three ways to the next logits, chosen by the model: our GPT with a cache of keys and values, models of transformers
with theirs, and for all others (sharded or wrapped) a forward pass over everything so far.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ..errors import UserError
from ..models.gpt_torch import Attention, Block, GPTModule, logits_of, rotated
from .logprobs_torch import token_logprobs
from .samples import uniforms
from .sampling import Sampling


class Response(NamedTuple):
    """What the policy answered. Both arrays have one number a token."""

    tokens: NDArray[np.int64]  # with the stop token that ended it
    logprobs: NDArray[np.float32]
    ended: bool  # False: cut at the most tokens


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[NDArray[np.int64]],
    seeds: NDArray[np.uint64],
    sampling: Sampling,
    run_on: bool = False,
) -> list[Response]:
    """A response to each prompt (at least one token each), in order; `Engine.call(generate, ...)` fits.

    `run_on` makes every call run as many forward passes, whatever ends early: where a model is sharded, ranks with
    prompts of their own must meet in each of them.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("an empty prompt cannot be answered; begin each with at least one token")
    training = model.training
    model.eval()
    try:
        return _generate(model, prompts, seeds, sampling, run_on)
    finally:
        model.train(training)


def _generate(
    model: nn.Module,
    prompts: Sequence[NDArray[np.int64]],
    seeds: NDArray[np.uint64],
    sampling: Sampling,
    run_on: bool,
) -> list[Response]:
    device = next(model.parameters()).device
    most = sampling.max_tokens
    stop = torch.tensor(sampling.stop, dtype=torch.long, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    lengths = torch.full((len(prompts),), most, device=device)
    tokens = torch.zeros(len(prompts), most, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(prompts), most, device=device)
    steps = _steps(model, prompts, most, device)
    logits = steps.first()
    for position in range(most):
        draws = torch.from_numpy(uniforms(seeds, position)).to(device)
        tokens[:, position] = drawn(logits, draws, sampling)
        logprobs[:, position] = token_logprobs(logits, tokens[:, position], temperature=sampling.scale)[0]
        now = torch.isin(tokens[:, position], stop) & ~ended
        lengths[now] = position + 1
        ended |= now
        if position + 1 == most or (not run_on and bool(ended.all())):
            break
        logits = steps.next(tokens[:, position])
    counts, over = lengths.tolist(), ended.tolist()
    found = zip(tokens.cpu().numpy(), logprobs.cpu().numpy(), counts, over, strict=True)
    return [Response(own[:count].copy(), chances[:count].copy(), done) for own, chances, count, done in found]


def drawn(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """The token of each row of logits (rows, vocab) for a number in [0, 1) of each row: its inverse distribution."""
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    chances = torch.softmax(logits.double() / sampling.temperature, dim=1)
    order: Tensor | None = None
    if sampling.top_k is not None or sampling.top_p < 1:
        chances, order = chances.sort(dim=1, descending=True, stable=True)
        if sampling.top_k is not None:
            chances[:, sampling.top_k :] = 0
        # What stands before the first token that reaches top_p, and that token.
        chances = torch.where(chances.cumsum(1) - chances < sampling.top_p, chances, 0)
    sums = chances.cumsum(dim=1)
    whole = sums[:, -1:].contiguous()
    place = torch.searchsorted(sums, draws[:, None] * whole, right=True)
    # A draw next to 1 may round to the whole sum: the last token that has a chance at all.
    place = torch.minimum(place, torch.searchsorted(sums, whole))
    return (place if order is None else order.gather(1, place))[:, 0]


class _Steps(Protocol):
    """Logits (rows, vocab) of the token after each prompt, then after each row's token before."""

    def first(self) -> Tensor: ...

    def next(self, tokens: Tensor) -> Tensor: ...


def _steps(model: nn.Module, prompts: Sequence[NDArray[np.int64]], most: int, device: torch.device) -> _Steps:
    longest = max(len(prompt) for prompt in prompts)
    limit = getattr(model, "max_len", None)
    if limit is not None and longest + most - 1 > limit:
        raise UserError(
            f"a prompt of {longest} tokens and a response of up to {most} need {longest + most - 1} in a row, but "
            f"model.max_len is {limit}; use shorter prompts, a smaller sampling.max_tokens or a larger max_len"
        )
    if type(model) is GPTModule and all(type(each.data) is Tensor and each.numel() for each in model.parameters()):
        return _CachedGPT(model, prompts, most, device)
    if hasattr(model, "prepare_inputs_for_generation"):
        return _CachedTransformers(model, prompts, device)
    return _Whole(model, prompts, most, device)


class _Whole:
    """A forward pass over prompt and response each time; rows are padded on the right, which no token looks at."""

    def __init__(self, model: nn.Module, prompts: Sequence[NDArray[np.int64]], most: int, device: torch.device) -> None:
        self.model = model
        self.ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.rows = torch.arange(len(prompts), device=device)
        self.width = int(self.ends.max())
        self.tokens = torch.zeros(len(prompts), self.width + most, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.as_tensor(prompt, device=device)

    def first(self) -> Tensor:
        logits = logits_of(self.model(self.tokens[:, : self.width]))
        return logits[self.rows, self.ends - 1]

    def next(self, tokens: Tensor) -> Tensor:
        self.tokens[self.rows, self.ends] = tokens
        self.ends = self.ends + 1
        self.width += 1
        return self.first()


class _CachedGPT:
    """Our GPT, one token at a time: the parts of gpt_torch.py over keys and values kept from before.

    Rows are padded on the right. A row's next token takes the first place of its padding, in the cache as in RoPE,
    and looks at nothing behind itself.
    """

    def __init__(self, model: GPTModule, prompts: Sequence[NDArray[np.int64]], most: int, device: torch.device) -> None:
        self.model = model
        self.whole = _Whole(model, prompts, most, device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def first(self) -> Tensor:
        whole = self.whole
        prompts = whole.tokens[:, : whole.width]
        places = torch.arange(whole.width, device=prompts.device).expand_as(prompts)
        x = self._through(prompts, places)
        return self._logits(x[whole.rows, whole.ends - 1])

    def next(self, tokens: Tensor) -> Tensor:
        places = self.whole.ends[:, None]
        x = self._through(tokens[:, None], places)
        self.whole.ends = self.whole.ends + 1
        return self._logits(x[:, 0])

    def _logits(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.norm(x)
        logits: Tensor = linear(x, model.embed.weight) if model.head is None else model.head(x)
        return logits

    def _through(self, tokens: Tensor, places: Tensor) -> Tensor:
        x: Tensor = self.model.embed(tokens)
        for number, block in enumerate(self.model.blocks):
            assert isinstance(block, Block), "of our GPT"
            x = x + self._attention(number, block.attention, block.attention_norm(x), places)
            x = x + block.mlp(block.mlp_norm(x))
        return x

    def _attention(self, number: int, attention: Attention, x: Tensor, places: Tensor) -> Tensor:
        rows, seq, width = x.shape
        qkv = attention.qkv(x).view(rows, seq, 3, attention.heads, width // attention.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotated(q, attention.theta, places), rotated(k, attention.theta, places)
        if number == len(self.keys):  # the prompts
            room = self.whole.tokens.shape[1]
            for kept, new in ((self.keys, k), (self.values, v)):
                kept.append(new.new_zeros(rows, attention.heads, room, new.shape[-1]))
                kept[number][:, :, :seq] = new
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            for kept, new in ((self.keys, k), (self.values, v)):
                kept[number][self.whole.rows, :, places[:, 0]] = new[:, :, 0]
            most = int(self.keys[number].shape[2])
            seen = torch.arange(most, device=x.device) <= places  # (rows, most)
            mixed = scaled_dot_product_attention(
                q, self.keys[number], self.values[number], attn_mask=seen[:, None, None]
            )
        joined: Tensor = attention.out(mixed.transpose(1, 2).reshape(rows, seq, width))
        return joined


class _CachedTransformers:
    """A causal model of transformers with its own cache: rows are padded on the left, behind an attention mask."""

    def __init__(self, model: Any, prompts: Sequence[NDArray[np.int64]], device: torch.device) -> None:
        self.model = model
        longest = max(len(prompt) for prompt in prompts)
        self.tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        self.mask = torch.zeros_like(self.tokens)
        for row, prompt in enumerate(prompts):
            self.tokens[row, longest - len(prompt) :] = torch.as_tensor(prompt, device=device)
            self.mask[row, longest - len(prompt) :] = 1
        self.ends = self.mask.sum(dim=1, keepdim=True)
        self.takes_places = "position_ids" in inspect.signature(model.forward).parameters
        self.past: Any = None

    def first(self) -> Tensor:
        return self._logits(self.tokens, (self.mask.cumsum(dim=1) - 1).clamp(min=0))

    def next(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat((self.mask, torch.ones_like(self.ends)), dim=1)
        logits = self._logits(tokens[:, None], self.ends)
        self.ends = self.ends + 1
        return logits

    def _logits(self, tokens: Tensor, places: Tensor) -> Tensor:
        own = {"position_ids": places} if self.takes_places else {}
        output = self.model(
            input_ids=tokens, attention_mask=self.mask, past_key_values=self.past, use_cache=True, **own
        )
        self.past = output.past_key_values
        return logits_of(output)[:, -1]
