"""Which prompts a step takes, and how its samples are shuffled into updates: pure functions of (seed, step)."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cursor import mix, permute, sample_ids
from .samples import seed_of

_PROMPTS, _SHUFFLE = 0x5250, 0x5253  # purposes, so that no two of these orders are the same


class Request(NamedTuple):
    """A prompt to be answered: the unit that is sent out, re-sent when its worker dies, and never split."""

    step: int
    place: int  # among the prompts of the step
    prompt: int  # its id in the data
    first: int  # index of its first sample: above 0 only where a step takes a prompt twice
    samples: int

    @property
    def indices(self) -> range:
        """Indices of its samples."""
        return range(self.first, self.first + self.samples)

    def seeds(self, run_seed: int) -> NDArray[np.uint64]:
        """The seed of each sample."""
        return np.array([seed_of(run_seed, self.step, self.prompt, index) for index in self.indices], dtype=np.uint64)


def requests(seed: int, step: int, *, prompts: int, samples: int, size: int) -> list[Request]:
    """The prompts of a step out of `size` of them; all steps in order go through all prompts once per epoch."""
    return asked(step, sample_ids(mix(seed, _PROMPTS), step, prompts, size), samples)


def asked(step: int, ids: NDArray[np.int64], samples: int) -> list[Request]:
    """A request for each of these prompts, in order."""
    before: Counter[int] = Counter()
    found = []
    for place, prompt in enumerate(ids.tolist()):
        found.append(Request(step, place, prompt, before[prompt] * samples, samples))
        before[prompt] += 1
    return found


def minibatches(seed: int, step: int, epoch: int, *, rows: int, num: int) -> list[NDArray[np.int64]]:
    """The rows of each update of an epoch over a step's samples, as even as whole rows allow, in a shuffled order.

    Raises nothing for fewer rows than updates: some are then empty, and the caller skips them.
    """
    order = permute(np.arange(rows), rows, mix(seed, _SHUFFLE, step, epoch))
    return [order[part * rows // num : (part + 1) * rows // num] for part in range(num)]
