"""One answer to one prompt: what generation knows of it, its seed, and how many of them become padded arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cursor import mix, scramble

_PURPOSE = 0x524C  # keeps these seeds apart from those of dropout and of the sample order
_GOLDEN = 0x9E3779B97F4A7C15

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A response as it was generated, and what is learnt about it later. Arrays of the response have its length."""

    step: int  # the step that it is meant for
    place: int  # of its prompt among the prompts of that step
    prompt: int  # the prompt's id in the data
    index: int  # which of the prompt's samples
    version: int  # of the weights that generated it: the number of steps they had learnt
    prompt_tokens: NDArray[np.int64]  # at least one
    tokens: NDArray[np.int64]  # the response, with its end token where it ended
    ended: bool  # False: cut at the most tokens
    logprobs: NDArray[np.float32]  # the rollout's, at its temperature
    mask: NDArray[np.bool_] | None = None  # tokens that the policy chose; None: all
    old: NDArray[np.float32] | None = None  # the trainer's log-probabilities before the first update
    ref: NDArray[np.float32] | None = None  # the reference's
    reward: float | None = None  # None: not scored, or scoring failed
    parts: Mapping[str, float] | None = None  # the reward of each reward function by name

    @property
    def chosen(self) -> NDArray[np.bool_]:
        """Which tokens of the response the policy chose."""
        return np.ones(len(self.tokens), dtype=bool) if self.mask is None else self.mask

    def state(self) -> dict[str, Any]:
        """As JSON; numbers come back bit by bit."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Sample:
        """From what `state` gave."""
        arrays: dict[str, Any] = {
            name: None if state[name] is None else np.asarray(state[name], dtype=kind) for name, kind in _KINDS.items()
        }
        return cls(**{**state, **arrays})


_KINDS: Mapping[str, type] = {
    "prompt_tokens": np.int64,
    "tokens": np.int64,
    "logprobs": np.float32,
    "mask": np.bool_,
    "old": np.float32,
    "ref": np.float32,
}


def seed_of(run_seed: int, step: int, prompt: int, index: int) -> int:
    """The 64-bit seed of a sample: whoever generates it, and however often, draws the same numbers."""
    return mix(run_seed, _PURPOSE, step, prompt, index)


def uniforms(seeds: NDArray[np.uint64], position: int) -> NDArray[np.float64]:
    """The number in [0, 1) that each sample draws for a position of its response: no state to carry along."""
    offset = np.uint64((position + 1) * _GOLDEN % (1 << 64))
    with np.errstate(over="ignore"):
        bits = scramble(seeds + offset)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def collate(samples: Sequence[Sample], *, pad: int = 0, length: int | None = None) -> Arrays:
    """Samples as rows, padded on the right, for `model(tokens)` and losses over its logits.

    `tokens` and `targets` (rows, columns), int64: prompt and response without the last, and without the first. What
    belongs to a token stands where that token is the target: `mask` (chosen by the policy), `rollout` and, where all
    samples have them, `old` and `ref`, float32. Of each row: `groups`, int64, alike for samples of a prompt,
    `rewards`, float64 (NaN: none), `ended` and `versions`. `length` is the number of columns; None: as many as needed.
    """
    most = max(len(sample.prompt_tokens) + len(sample.tokens) - 1 for sample in samples)
    columns = most if length is None else length
    assert columns >= most, f"{columns} columns, but a sample has {most}"
    tokens = np.full((len(samples), columns + 1), pad, dtype=np.int64)
    for row, sample in enumerate(samples):
        assert len(sample.prompt_tokens), "no model says what comes first: a prompt has at least one token"
        whole = np.concatenate((sample.prompt_tokens, sample.tokens))
        tokens[row, : len(whole)] = whole
    arrays: Arrays = {
        "tokens": tokens[:, :-1].copy(),
        "targets": tokens[:, 1:].copy(),
        "mask": spread(samples, [sample.chosen for sample in samples], columns, np.bool_),
        "rollout": spread(samples, [sample.logprobs for sample in samples], columns, np.float32),
        "groups": np.array([sample.place for sample in samples], dtype=np.int64),
        "rewards": np.array([np.nan if s.reward is None else s.reward for s in samples], dtype=np.float64),
        "ended": np.array([sample.ended for sample in samples], dtype=bool),
        "versions": np.array([sample.version for sample in samples], dtype=np.int64),
    }
    for name in ("old", "ref"):
        found = [getattr(sample, name) for sample in samples]
        if all(values is not None for values in found):
            arrays[name] = spread(samples, found, columns, np.float32)
    return arrays


def spread(samples: Sequence[Sample], values: Sequence[NDArray[Any]], columns: int, kind: Any) -> NDArray[Any]:
    """Values of each response's tokens, where those tokens are targets; 0 elsewhere."""
    found = np.zeros((len(samples), columns), dtype=kind)
    for row, (sample, own) in enumerate(zip(samples, values, strict=True)):
        found[row, _columns(sample)] = own
    return found


def collected(samples: Sequence[Sample], array: NDArray[Any]) -> list[NDArray[Any]]:
    """The values of each response's tokens from a padded array: what `spread` does, undone."""
    return [array[row, _columns(sample)].copy() for row, sample in enumerate(samples)]


def token_rewards(rewards: NDArray[np.floating], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(rows, columns): each sample's reward on the last token that its policy chose, 0 elsewhere.

    A sample without a reward (NaN) gets 0: `scored_mask` leaves it out.
    """
    found = np.zeros(mask.shape)
    rows = np.flatnonzero(mask.any(axis=1) & ~np.isnan(rewards))
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    found[rows, last[rows]] = rewards[rows]
    return found


def scored_mask(arrays: Arrays) -> NDArray[np.bool_]:
    """The mask without samples that have no reward: they take part in no mean, and nothing is learnt from them."""
    found: NDArray[np.bool_] = arrays["mask"] & ~np.isnan(arrays["rewards"])[:, None]
    return found


def trained_mask(arrays: Arrays, *, mask_truncated: bool = False) -> NDArray[np.bool_]:
    """The mask of the losses: without samples that have no reward and, if asked, without those that never ended.

    A truncated sample's reward still counts in its group's mean (Yu et al., "DAPO", 2025, section 3.4, overlong
    filtering).
    """
    mask = scored_mask(arrays)
    return mask & arrays["ended"][:, None] if mask_truncated else mask


def _columns(sample: Sample) -> slice:
    first = len(sample.prompt_tokens) - 1
    return slice(first, first + len(sample.tokens))
