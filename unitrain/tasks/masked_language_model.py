"""Train an encoder to fill in masked tokens (Devlin et al., "BERT", 2019)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..models.gpt_torch import logits_of
from ..models.hf_config import HF
from ..strategy import Loss
from .named import NamedModel, named_model

CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1  # of all tokens; of the chosen ones


class MaskedLanguageModel(NamedModel):
    """`model:` is hf with task masked-lm; `data:` a source of tokens whose tokenizer has a mask token.

    Which tokens are masked is drawn anew in each step, from the seed and the place in the batch.
    """

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Cross entropy in nats, in fp32, of the chosen tokens: their sum and their number."""
        tokens, weight = batch["tokens"].long(), batch.get("weight")
        real = torch.ones_like(tokens, dtype=torch.bool)
        if weight is not None:
            # A weight is that of the next token: a token is real where it was the next, and the first always is.
            real[:, 1:] = weight[:, :-1] > 0
        chosen = (torch.rand(tokens.shape, device=tokens.device) < CHOSEN) & real
        draw = torch.rand(tokens.shape, device=tokens.device)
        others = torch.randint_like(tokens, self.vocab_size)
        seen = torch.where(chosen & (draw < MASKED), self.mask_token, tokens)
        seen = torch.where(chosen & (draw >= 1 - RANDOM), others, seen)
        logits = logits_of(model(seen, attention_mask=real.long())).flatten(0, 1).float()
        each = nn.functional.cross_entropy(logits, tokens.flatten(), reduction="none")
        return Loss((each * chosen.flatten()).sum(), chosen.sum())

    @functools.cached_property
    def config(self) -> HF:
        """The model's options. Raises RecipeError where they do not fit the data."""
        options: HF = named_model(self.recipe, HF, task="masked-lm")
        self._check_tokens(options, "a masked language model")
        return options.with_vocabulary(self.vocab_size)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Tokens of the data."""
        return int(self._source().vocab_size)  # type: ignore[attr-defined]  # of a source of tokens

    @functools.cached_property
    def mask_token(self) -> int:
        """The id that stands for a hidden token."""
        mask = getattr(getattr(self._source(), "tokenizer", None), "mask", None)
        if mask is None:
            raise RecipeError(
                f"data {self.recipe.data.name!r} has no mask token; give data.tokenizer a tokenizer.json with [MASK] "
                "or <mask>"
            )
        return int(mask)
