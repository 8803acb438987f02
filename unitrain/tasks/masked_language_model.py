"""Train an encoder to fill in masked tokens (Devlin et al., "BERT", 2019)."""

from __future__ import annotations

import functools

from ..errors import RecipeError
from ..models.hf_config import HF
from .named import NamedModel, named_model


class MaskedLanguageModel(NamedModel):
    """`model:` is hf with task masked-lm; `data:` a source of tokens whose tokenizer has a mask token.

    Which tokens are masked is drawn anew in each step, from the seed and the place in the batch.
    """

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
