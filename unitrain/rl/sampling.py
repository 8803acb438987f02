"""How a response is drawn from a policy, as `sampling:` in a recipe spells it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RecipeError
from ..recipe import at_least, key


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Log-probabilities are always those of all tokens at `temperature`: top_k and top_p restrict the draw alone."""

    max_tokens: int = key(16, "most tokens of a response")
    temperature: float = key(1.0, "what logits are divided by; 0: the likeliest token")
    top_k: int | None = key(None, "draw among so many of the likeliest tokens; null: all")
    top_p: float = key(1.0, "draw among the likeliest tokens that together have this probability")
    stop: tuple[int, ...] = key((), "tokens that end a response, and belong to it")

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))  # YAML gives a list
        at_least("sampling.max_tokens", self.max_tokens, 1)
        at_least("sampling.temperature", self.temperature, 0)
        if self.top_k is not None:
            at_least("sampling.top_k", self.top_k, 1)
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"sampling.top_p is {self.top_p}; it must be above 0 and at most 1")

    @property
    def scale(self) -> float:
        """The temperature of log-probabilities, here and in the trainer's forward pass: 1 for greedy responses."""
        return self.temperature or 1.0
