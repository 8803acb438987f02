"""Models that say one number for each token: critics and reward models, made of a language model's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import registry
from ..models.config import GPT
from ..models.gpt_torch import logits_of
from ..models.hf_config import HF


class ValueModel:
    """Builds the model of a configuration with a head of one output, which begins at 0, in place of the vocabulary's.

    `initial` gives the other parameters' first values.
    """

    def __init__(self, config: GPT | HF, initial: Callable[[str, tuple[int, ...], int], NDArray[np.float32]]) -> None:
        self.config = dataclasses.replace(config, tied=False) if isinstance(config, GPT) else config
        self._others = initial
        with torch.device("meta"):
            self.head = _head_name(self._language_model())

    def build(self) -> Any:
        """The model, whose logits are (rows, seq, 1)."""
        model = self._language_model()
        parent, _, name = self.head.rpartition(".")
        old = model.get_submodule(self.head)
        setattr(model.get_submodule(parent), name, nn.Linear(_inputs(old), 1, bias=False, device=old.weight.device))
        if isinstance(self.config, HF):
            model.config.tie_word_embeddings = False
        return model

    def frozen(self) -> Any:
        """The same for one that only says its numbers."""
        return self.build().requires_grad_(False)

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """See Role.initial."""
        return np.zeros(shape, dtype=np.float32) if self.is_head(name) else self._others(name, shape, seed)

    def is_head(self, name: str) -> bool:
        """True for the parameter that no language model has."""
        return name == f"{self.head}.weight"

    def _language_model(self) -> Any:
        return registry.resolve(self.config.modules["torch"])(self.config)


def values_of(model: Any, tokens: Tensor) -> Tensor:
    """The number for each token, (rows, seq), in fp32."""
    return logits_of(model(tokens))[..., 0].float()


def last_values(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """The number at each row's last unmasked target, with that target as the last token that is seen; (rows,).

    tokens (rows, seq) are everything, targets included; mask (rows, seq) marks the response among them.
    """
    values = values_of(model, tokens)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    last = torch.where(mask, places, 0).amax(dim=1)
    return values.gather(1, last[:, None])[:, 0]


def with_last(tokens: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, shifted by one, as whole rows, and the mask over these."""
    whole = torch.cat((tokens[:, :1], targets), dim=1)
    return whole, torch.cat((torch.zeros_like(mask[:, :1]), mask), dim=1)


def _head_name(model: Any) -> str:
    head = model.head if hasattr(model, "head") else model.get_output_embeddings()
    return next(str(name) for name, module in model.named_modules() if module is head)


def _inputs(layer: Any) -> int:
    return int(layer.weight.shape[1])
