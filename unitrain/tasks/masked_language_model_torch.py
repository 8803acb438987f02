"""The masked language model's loss in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.gpt_torch import logits_of
from ..strategy import Loss

if TYPE_CHECKING:
    from .masked_language_model import MaskedLanguageModel

CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1  # of all tokens; of the chosen ones


def loss(task: MaskedLanguageModel, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Cross entropy in nats, in fp32, of the chosen tokens: their sum and their number."""
    tokens, weight = batch["tokens"].long(), batch.get("weight")
    real = torch.ones_like(tokens, dtype=torch.bool)
    if weight is not None:
        # A weight is that of the next token: a token is real where it was the next, and the first always is.
        real[:, 1:] = weight[:, :-1] > 0
    chosen = (torch.rand(tokens.shape, device=tokens.device) < CHOSEN) & real
    draw = torch.rand(tokens.shape, device=tokens.device)
    others = torch.randint_like(tokens, task.vocab_size)
    seen = torch.where(chosen & (draw < MASKED), task.mask_token, tokens)
    seen = torch.where(chosen & (draw >= 1 - RANDOM), others, seen)
    logits = logits_of(model(seen, attention_mask=real.long())).flatten(0, 1).float()
    each = nn.functional.cross_entropy(logits, tokens.flatten(), reduction="none")
    return Loss((each * chosen.flatten()).sum(), chosen.sum())
