"""What a rollout actor generates with: weights in, responses out, and proof of which weights it holds.

An engine is a class of this shape by its name in SAMPLERS or by its path. It lives in the actor's process alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..cursor import mix
from .registry import Registry
from .sampling import Sampling

Response = tuple[NDArray[np.int64], NDArray[np.float32], bool]  # tokens, their log-probabilities, ended
Tensors = Mapping[str, "Tensor"]


class Tensor(NamedTuple):
    """A whole tensor of the policy. numpy has no bfloat16: its bits travel as uint16."""

    dtype: str
    data: NDArray[Any]


class Weights(NamedTuple):
    """One version of the policy."""

    version: int
    still: Tensors  # what no update moves, where that has not been sent before
    moving: Tensors
    digests: Mapping[str, int]  # of all


@dataclass(frozen=True)
class Plan:
    """What an actor is told before it has any weights. It is sent to another process."""

    model: Callable[[], Any]  # builds the policy's module, with any weights
    config: Any  # of a built-in model; None: only `model` knows
    precision: str
    run_seed: int
    gpu: bool
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)  # rl.rollout.options


class Sampler(Protocol):
    """The contract; made by `kind(plan)`."""

    def load(self, tensors: Tensors) -> None:
        """Take over these tensors; those of other names stay as they are."""

    def digests(self, names: Sequence[str]) -> dict[str, int]:
        """`digest.box_digest` of these tensors as they are held now, after `load`."""

    def generate(
        self, prompts: Sequence[NDArray[np.int64]], seeds: NDArray[np.uint64], sampling: Sampling
    ) -> list[Response]:
        """A response to each prompt, in order, drawn by each one's seed (see generate_torch)."""


SAMPLERS = Registry(
    "rollout engine",
    {"own": "unitrain.rl.sampler_torch:TorchSampler", "vllm": "unitrain.rl.vllm_torch:VLLMSampler"},
)


def content_hash(digests: Mapping[str, int]) -> int:
    """One number for all tensors together, names included."""
    found = 0
    for name in sorted(digests):
        found = mix(found, *name.encode(), digests[name])
    return found
