"""Responses to a step's prompts, generated and scored by the ranks of the policy itself, and known to all of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.records import Records
from ..strategy import Engine
from .generate_torch import Response, generate
from .prompts import Request
from .rewards import Query, RewardFailed, RewardFailure, Rewards
from .rows_torch import Rows
from .samples import Sample
from .sampling import Sampling

_MOST_BYTES = 1000  # of a failure in words, as ranks exchange it

Tell = Callable[..., None]  # (event, **facts)


def _untold(event: str, **facts: Any) -> None:
    """Nobody wants to know."""


class LocalRollout:
    """Synchronous: each rank answers its share of the prompts with the weights that it is about to train.

    `seconds` says how long the last call spent on each phase.
    """

    def __init__(
        self, engine: Engine, rows: Rows, rewards: Rewards | None, *, run_seed: int, tell: Tell = _untold
    ) -> None:
        self.engine, self.rows, self.rewards, self.run_seed, self.tell = engine, rows, rewards, run_seed, tell
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, float] = {}  # metrics of the last call

    def samples(
        self, requests: Sequence[Request], records: Records, sampling: Sampling, *, version: int, max_failures: int = 0
    ) -> list[Sample]:
        """Samples of all requests, in order, the same on every rank. A collective.

        Raises RewardFailed, on all ranks, where more than `max_failures` of them could not be scored.
        """
        sampling = stopping(sampling, records)
        own = self.rows.own(len(requests))
        asked = requests[own.start : own.stop] or requests[:1]  # a rank without prompts meets the others all the same
        prompts = [records.prompt(request.prompt) for request in asked for _ in request.indices]
        seeds = np.concatenate([request.seeds(self.run_seed) for request in asked])
        began = time.monotonic()
        # Sharded models run as one, so that all ranks must take as many steps.
        found: list[Response] = self.engine.call(_generated, prompts, seeds, sampling, self.rows.size > 1)
        named = [(request, index) for request in asked for index in request.indices]
        drawn = [
            sample_of(request, index, version, prompt, *response)
            for (request, index), prompt, response in zip(named, prompts, found, strict=True)
        ]
        generated = time.monotonic()
        samples, failures = scored(self.rewards, drawn, records, sampling)
        self.seconds = {"generate": generated - began, "reward": time.monotonic() - generated}
        if not own:
            samples, failures = [], []
        each = requests[0].samples
        mine = range(own.start * each, own.stop * each)
        names = [reward.called for reward in self.rewards.rewards] if self.rewards else []
        samples = exchanged(self.rows, requests, records, samples, mine, sampling, names)
        refuse_failed(self.rows, samples, failures, mine.start, max_failures, self.tell)
        return samples


def stopping(sampling: Sampling, records: Records) -> Sampling:
    """With the records' end where the recipe names none."""
    return dataclasses.replace(sampling, stop=sampling.stop or records.stop)


def sample_of(
    request: Request,
    index: int,
    version: int,
    prompt: NDArray[np.int64],
    tokens: NDArray[np.int64],
    logprobs: NDArray[np.float32],
    ended: bool,
) -> Sample:
    """A response that has no reward yet."""
    return Sample(
        step=request.step,
        place=request.place,
        prompt=request.prompt,
        index=index,
        version=version,
        prompt_tokens=prompt,
        tokens=tokens,
        ended=ended,
        logprobs=logprobs,
    )


def scored(
    rewards: Rewards | None, samples: Sequence[Sample], records: Records, sampling: Sampling
) -> tuple[list[Sample], list[RewardFailure]]:
    """The samples with their rewards, and what could not be scored."""
    if rewards is None:
        return [dataclasses.replace(sample, reward=0.0, parts={}) for sample in samples], []
    column = records.options.prompt
    queries = [
        Query(
            name=f"step {sample.step}, prompt {sample.prompt}, sample {sample.index}",
            prompt=str(records.rows[sample.prompt][column]),
            completion=records.decode(_without_end(sample, sampling.stop)),
            columns=records.columns(sample.prompt),
        )
        for sample in samples
    ]
    found = rewards.score(queries)
    return [
        dataclasses.replace(
            sample,
            reward=None if np.isnan(found.rewards[row]) else float(found.rewards[row]),
            parts={name: float(values[row]) for name, values in found.parts.items()},
        )
        for row, sample in enumerate(samples)
    ], found.failures


def exchanged(
    rows: Rows,
    requests: Sequence[Request],
    records: Records,
    own: Sequence[Sample],
    mine: range,
    sampling: Sampling,
    names: Sequence[str],
) -> list[Sample]:
    """Every rank's samples on every rank, in the order of the requests. A collective.

    `own` are those of the rows `mine` of all; a row that no rank has is left out. `names` are those of the rewards.
    """
    if rows.size == 1:
        return list(own)
    total, most, each = sum(request.samples for request in requests), sampling.max_tokens, requests[0].samples
    tokens, logprobs = np.zeros((total, most), dtype=np.int64), np.zeros((total, most), dtype=np.float32)
    facts, scores = np.zeros((total, 4), dtype=np.int64), np.zeros((total, 1 + len(names)))
    first = {request.place: number * each - request.first for number, request in enumerate(requests)}
    for sample in own:
        row = first[sample.place] + sample.index
        assert row in mine, "a rank speaks of its own rows"
        length = len(sample.tokens)
        tokens[row, :length], logprobs[row, :length] = sample.tokens, sample.logprobs
        facts[row] = 1, length, sample.ended, sample.version
        parts = sample.parts or {}
        scores[row] = [np.nan if sample.reward is None else sample.reward, *(parts[name] for name in names)]
    tokens, logprobs, facts, scores = (rows.summed(array) for array in (tokens, logprobs, facts, scores))
    samples = []
    for number, request in enumerate(requests):
        prompt = records.prompt(request.prompt)
        for offset, index in enumerate(request.indices):
            row = number * each + offset
            there, length, ended, version = facts[row].tolist()
            if not there:
                continue
            drawn = sample_of(
                request, index, version, prompt, tokens[row, :length].copy(), logprobs[row, :length].copy(), bool(ended)
            )
            reward, *values = scores[row].tolist()
            samples.append(
                dataclasses.replace(
                    drawn, reward=None if np.isnan(reward) else reward, parts=dict(zip(names, values, strict=True))
                )
            )
    return samples


def refuse_failed(
    rows: Rows, samples: Sequence[Sample], failures: Sequence[RewardFailure], first: int, most: int, tell: Tell
) -> None:
    """Report what has no reward; raise RewardFailed, on all ranks, where it is more than may be. A collective."""
    failed = sum(sample.reward is None for sample in samples)
    if not failed:
        return
    texts = np.zeros((len(samples), _MOST_BYTES), dtype=np.uint8)
    for failure in failures:
        said = str(failure).encode()[:_MOST_BYTES]
        texts[first + failure.row, : len(said)] = np.frombuffer(said, dtype=np.uint8)
    table = rows.summed(texts.astype(np.int64)).astype(np.uint8)
    said_of = [bytes(row[row > 0]).decode(errors="replace") for row in table]
    told = [(sample, text) for sample, text in zip(samples, said_of, strict=True) if sample.reward is None]
    for sample, text in told:
        tell("reward_failed", prompt=sample.prompt, sample=sample.index, error=text)
    if failed > most:
        raise RewardFailed(f"{told[0][1]}; {failed} of {len(samples)} samples have no reward, at most {most} may")


def means(samples: Sequence[Sample], *, several: bool = False) -> dict[str, float]:
    """Mean reward, of each function where there are several rewards, and length."""
    found_rewards = [sample for sample in samples if sample.reward is not None]
    rewards = [sample.reward for sample in found_rewards if sample.reward is not None]
    found = {"reward": float(np.mean(rewards)) if rewards else float("nan")}
    parts: Mapping[str, float] = (found_rewards[0].parts or {}) if found_rewards else {}
    if several or len(parts) > 1:
        found |= {f"reward/{name}": float(np.mean([(s.parts or {})[name] for s in found_rewards])) for name in parts}
    return found | {"length": float(np.mean([len(sample.tokens) for sample in samples]))}


def _generated(
    model: nn.Module, prompts: list[NDArray[np.int64]], seeds: NDArray[np.uint64], sampling: Sampling, together: bool
) -> list[Response]:
    sharded = any(type(each.data) is not Tensor or not each.numel() for each in model.parameters())
    return generate(model, prompts, seeds, sampling, together and sharded)


def _without_end(sample: Sample, stop: Sequence[int]) -> NDArray[np.int64]:
    ends = sample.ended and len(sample.tokens) and sample.tokens[-1] in stop
    return sample.tokens[:-1] if ends else sample.tokens
