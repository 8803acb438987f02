"""What lives in a rollout actor: a copy of the policy that knows its version, and draws what it is asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnitrainError
from .prompts import Request
from .sampler import SAMPLERS, Plan, Sampler, Tensors, content_hash
from .sampling import Sampling


class RolloutFailed(UnitrainError):
    """A step's prompts cannot be answered."""


class PromptsFailed(RolloutFailed):
    """More prompts stay without an answer than the run allows."""

    retry = False


class WeightsDiffer(UnitrainError):
    """A rollout actor holds other weights than it was sent."""


class StaleWeights(UnitrainError):
    """The actor does not hold the weights that it was asked to draw with."""


@dataclass(frozen=True)
class Answers:
    """Responses to some prompts, as rows, and the weights that drew them."""

    version: int
    content: int  # content_hash of what was held
    tokens: NDArray[np.int64]  # (rows, most tokens)
    logprobs: NDArray[np.float32]
    lengths: NDArray[np.int64]
    ended: NDArray[np.bool_]
    seconds: float  # of generation


class RolloutWorker:
    """Not a member of anything: it can be ended and replaced at any moment."""

    def __init__(self, engine: str, plan: Plan) -> None:
        self.plan = plan
        kind: Any = SAMPLERS.get(engine)
        self.sampler: Sampler = kind(plan)
        self.version: int | None = None
        self._digests: dict[str, int] = {}
        self._content = 0

    def load(self, version: int, *parts: Tensors) -> dict[str, int]:
        """Become that version; the digest of every tensor that is held afterwards."""
        self.version = None  # until all is in place
        for tensors in parts:
            self.sampler.load(tensors)
            self._digests |= self.sampler.digests(list(tensors))
        self.version, self._content = version, content_hash(self._digests)
        return self._digests

    def generate(
        self, version: int, requests: Sequence[Request], prompts: Sequence[NDArray[np.int64]], sampling: Sampling
    ) -> Answers:
        """Answer each request's samples, in order, by that version's weights. Raises StaleWeights without them."""
        if version != self.version:
            raise StaleWeights(f"asked for weights of version {version}, and holds {self.version}")
        began = time.monotonic()
        repeated = [prompt for request, prompt in zip(requests, prompts, strict=True) for _ in request.indices]
        seeds = np.concatenate([request.seeds(self.plan.run_seed) for request in requests])
        found = self.sampler.generate(repeated, seeds, sampling)
        shape = (len(found), sampling.max_tokens)
        tokens, logprobs = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        for row, (own, chances, _) in enumerate(found):
            tokens[row, : len(own)], logprobs[row, : len(own)] = own, chances
        return Answers(
            version=version,
            content=self._content,
            tokens=tokens,
            logprobs=logprobs,
            lengths=np.array([len(own) for own, _, _ in found], dtype=np.int64),
            ended=np.array([ended for _, _, ended in found], dtype=bool),
            seconds=time.monotonic() - began,
        )
