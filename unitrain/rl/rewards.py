"""What a response is worth: reward functions with weights, any callables, and learned models.

A reward function takes keywords and returns a number: `prompt` and `completion` as text, and the columns of the
prompt's row in the data, of which it gets those that its signature names (all, with **columns).

    def exact_match(completion, answer):
        return float(completion.strip() == answer)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UnitrainError, UserError
from ..recipe import above, at_least
from .reward_pool import Call, Job, RewardPool


@dataclass(frozen=True)
class Query:
    """What a reward is asked for."""

    name: str  # of the sample, for messages: `step 3, prompt 17, sample 2`
    prompt: str
    completion: str
    columns: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # values that JSON has


@dataclass(frozen=True)
class Reward:
    """One reward function and its share of the sum."""

    function: Callable[..., Any] | str  # or "module:function"
    weight: float = 1.0
    name: str = ""  # empty: the function's own

    @property
    def called(self) -> str:
        """Its name in metrics and messages."""
        if self.name:
            return self.name
        function = self.function
        if isinstance(function, str):
            return function.rpartition(":")[2]
        return str(getattr(function, "__qualname__", type(function).__name__)).rpartition(".")[2]


@dataclass(frozen=True)
class Learned:
    """A reward that scores all samples at once, in this process: a reward model's forward pass."""

    score: Callable[[Sequence[Query]], Any]  # as many numbers as queries
    name: str
    weight: float = 1.0

    @property
    def called(self) -> str:
        """Its name in metrics and messages."""
        return self.name


class RewardFailure(NamedTuple):
    """A sample that a function could not score."""

    function: str
    sample: str
    row: int  # of the query
    what: str

    def __str__(self) -> str:
        return f"the reward function {self.function!r} {self.what} on {self.sample}"


class RewardFailed(UnitrainError):
    """More samples could not be scored than the run allows."""

    retry = False


class Scored(NamedTuple):
    """Rewards of the queries, in order; NaN where a function failed."""

    rewards: NDArray[np.float64]
    parts: dict[str, NDArray[np.float64]]  # of each function, before its weight
    failures: list[RewardFailure]

    def require(self, most: int = 0) -> Scored:
        """Itself. Raises RewardFailed, naming function and sample, for more than `most` failures."""
        if len(self.failures) > most:
            others = f"; so did {len(self.failures) - 1} more calls" if len(self.failures) > 1 else ""
            raise RewardFailed(f"{self.failures[0]}{others}; at most {most} of {len(self.rewards)} samples may fail")
        return self


class Rewards:
    """Scores responses by the weighted sum of rewards. A context manager: it owns processes."""

    def __init__(
        self,
        rewards: Callable[..., Any] | str | Reward | Learned | Sequence[Callable[..., Any] | str | Reward | Learned],
        *,
        processes: int = 2,
        limit_seconds: float = 5.0,
        retries: int = 1,
    ) -> None:
        """`limit_seconds` is of one call; `retries` how often a failed call is made again.

        Raises UserError for functions that cannot be found or told apart.
        """
        at_least("rl.reward.processes", processes, 1)
        above("rl.reward.limit_seconds", limit_seconds, 0)
        at_least("rl.reward.retries", retries, 0)
        many = rewards if isinstance(rewards, Sequence) and not isinstance(rewards, str) else [rewards]
        self.rewards = [each if isinstance(each, Reward | Learned) else Reward(each) for each in many]
        names = [reward.called for reward in self.rewards]
        if not names or len(set(names)) < len(names):
            raise UserError(f"reward functions need names that differ, and these are {names}; give Reward(name=...)")
        self._calls = [Call(reward.called, reward.function) for reward in self.rewards if isinstance(reward, Reward)]
        self._pool = RewardPool(self._calls, processes=processes, limit_seconds=limit_seconds, retries=retries)

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def score(self, queries: Sequence[Query]) -> Scored:
        """Rewards of all queries. What fails is named in `failures`, and the others are scored all the same.

        A call fails that raises, that takes longer than the limit (its process is killed), that ends its process, or
        that returns anything but a finite number. Raises UserError for a column that the data has not.
        """
        jobs = [Job(call, row, _offered(query)) for row, query in enumerate(queries) for call in self._calls]
        self._pool.run(jobs)
        parts = {call.name: np.full(len(queries), np.nan) for call in self._calls}
        failures = []
        for job in jobs:
            parts[job.call.name][job.row] = job.value
            if job.failure:
                failures.append(RewardFailure(job.call.name, queries[job.row].name, job.row, job.failure))
        for learned in (reward for reward in self.rewards if isinstance(reward, Learned)):
            parts[learned.name], unfit = _learned(learned, queries)
            failures += unfit
        total = np.zeros(len(queries))
        for reward in self.rewards:
            total += reward.weight * parts[reward.called]
        return Scored(total, parts, failures)

    def close(self) -> None:
        """End the processes."""
        self._pool.close()


def _offered(query: Query) -> dict[str, Any]:
    return {**query.columns, "prompt": query.prompt, "completion": query.completion}


def _learned(learned: Learned, queries: Sequence[Query]) -> tuple[NDArray[np.float64], list[RewardFailure]]:
    """Scores of a learned reward. Raises RewardFailed for another number of them than queries."""
    scores = np.asarray(learned.score(queries), dtype=np.float64)
    if scores.shape != (len(queries),):
        raise RewardFailed(
            f"the learned reward {learned.name!r} returned scores of shape {scores.shape} for {len(queries)} samples; "
            "it must return one number each"
        )
    finite = np.isfinite(scores)
    unfit = [
        RewardFailure(learned.name, query.name, row, f"returned {scores[row]}, not a finite number,")
        for row, query in enumerate(queries)
        if not finite[row]
    ]
    return np.where(finite, scores, np.nan), unfit
