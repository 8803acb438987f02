"""Reward models that learn which of two completions people prefer (Bradley-Terry)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.records import Pairs, View
from ..strategy import Loss
from .preferences_torch import reward_model_loss
from .task_torch import RLTask
from .value_torch import ValueModel, last_values, with_last


class RewardModel(RLTask):
    """`data:` records of prompt, chosen and rejected; the model's score is read at the last token of a completion.

    With `rl.base`, a language model's weights but its head, which begins at 0.
    """

    view: ClassVar[type[View] | None] = Pairs

    def build_model(self) -> Any:
        """See Trainer."""
        return self.values.build()

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """See Trainer."""
        return self.values.initial(name, shape, seed)

    @functools.cached_property
    def values(self) -> ValueModel:
        """The model with a head of one output."""
        return ValueModel(self.config, super().initial)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """-log sigmoid(score of chosen - score of rejected), summed over pairs; accuracy and margin."""
        pairs = {name: array.flatten(0, 1) for name, array in batch.items()}
        tokens, mask = with_last(pairs["tokens"], pairs["targets"], pairs["weight"] > 0)
        chosen, rejected = last_values(model, tokens, mask).view(-1, 2).unbind(1)
        return reward_model_loss(chosen, rejected, center=self.rl.center)
