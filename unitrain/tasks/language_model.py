"""Train a language model on text or tokens: the next token at every position."""

from __future__ import annotations

import functools

import numpy as np

from ..models.config import GPT
from ..models.hf_config import HF
from .named import NamedModel, named_model

SAMPLE_PROMPT, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 32, 160, 0.8


class LanguageModel(NamedModel):
    """`model:` is a gpt or hf; `data:` a source of arrays tokens and targets (rows, seq_len), int64.

    A source may also give weight (rows, seq_len), float32: how much each target counts, 0 for padding.
    """

    def flops_per_sample(self) -> float | None:
        """See Trainer."""
        return self._flops

    @functools.cached_property
    def _flops(self) -> float:
        seq_len = self._source().tokens_per_sample
        return self.config.flops_per_token(seq_len) * seq_len

    def finish(self) -> None:
        """Print how the model goes on from the first tokens of the data, where the source can spell them."""
        source = self._source() if self.eval_source is None else self.eval_source
        decode = getattr(source, "decode", None)
        if decode is None:
            return
        prompt = source.fetch(np.array([0]))["tokens"][0, :SAMPLE_PROMPT].tolist()
        # On every rank: where the model is sharded, each forward pass is a collective.
        tokens = self.engines["model"].call(
            self.native.generate,
            prompt,
            SAMPLE_TOKENS,
            SAMPLE_TEMPERATURE,
            self.recipe.train.seed,
            source.tokens_per_sample,
        )
        if self.world.first:
            print(f"a sample, after the prompt {decode(prompt)!r}:\n{decode(tokens[len(prompt) :])}", flush=True)

    @functools.cached_property
    def config(self) -> GPT | HF:
        """The model's options, with the vocabulary of the data. Raises RecipeError where the two do not fit."""
        options: GPT | HF = named_model(self.recipe, GPT, HF, task="causal-lm")
        self._check_tokens(options, "a language model")
        return options.with_vocabulary(self._source().vocab_size)  # type: ignore[attr-defined]  # checked
