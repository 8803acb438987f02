"""Train a classifier of texts: an encoder or a language model with a head of classes."""

from __future__ import annotations

import functools
from typing import Any

from ..errors import RecipeError
from ..models.hf_config import HF
from .named import NamedModel, named_model


class SequenceClassification(NamedModel):
    """`model:` is hf with task sequence-classification; `data:` a source of tokens (rows, seq_len), int64, mask of the
    same shape, 1 on tokens and 0 on padding, and y (rows,), int64.
    """

    def build_model(self) -> Any:
        """See Trainer."""
        model: Any = super().build_model()
        if model.config.pad_token_id is None:
            # A decoder's class is read at the last token that is no padding.
            model.config.pad_token_id = self._source().pad  # type: ignore[attr-defined]  # of labelled texts
        self.pad = model.config.pad_token_id
        return model

    @functools.cached_property
    def config(self) -> HF:
        """The model's options. Raises RecipeError where they do not fit what the data says of itself."""
        options: HF = named_model(self.recipe, HF, task="sequence-classification")
        source = self._source()
        self._check_tokens(options, "a classifier of texts")
        num_classes = getattr(source, "num_classes", None)
        if num_classes is None:
            raise RecipeError(
                f"data {self.recipe.data.name!r} has no classes; use datasets, and name its column in data.label"
            )
        known = options.num_labels or len(options.values().get("id2label") or ()) or 2  # transformers' own default
        if known < num_classes:
            raise RecipeError(f"the model has {known} classes, but the data has {num_classes}; set model.num_labels")
        return options.with_vocabulary(source.vocab_size)  # type: ignore[attr-defined]  # checked
