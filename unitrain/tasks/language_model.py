"""Train a GPT on text or tokens: the next token at every position."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import registry
from ..data.source import Source
from ..errors import RecipeError
from ..models.config import GPT
from ..models.gpt_torch import generate
from ..strategy import Loss
from ..trainer import Trainer
from .named import named_model

SAMPLE_PROMPT, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 32, 160, 0.8


class LanguageModel(Trainer):
    """`model:` is a gpt; `data:` a source of arrays tokens and targets (rows, seq_len), int64.

    A source may also give weight (rows, seq_len), float32: how much each target counts, 0 for padding.
    """

    def build_model(self) -> nn.Module:
        """See Trainer."""
        module: nn.Module = registry.resolve(self.config.modules["torch"])(self.config)
        return module

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """See Trainer."""
        return self.config.initial(name, shape, seed)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Cross entropy in nats, in fp32: the sum over tokens and the number of tokens."""
        logits = model(batch["tokens"].long()).flatten(0, 1).float()
        targets, weight = batch["targets"].long().flatten(), batch.get("weight")
        if weight is None:
            return Loss(nn.functional.cross_entropy(logits, targets, reduction="sum"), len(targets))
        each = nn.functional.cross_entropy(logits, targets, reduction="none")
        return Loss((each * weight.flatten()).sum(), weight.sum())

    def flops_per_sample(self) -> float | None:
        """See Trainer."""
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
            generate, prompt, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, self.recipe.train.seed, source.tokens_per_sample
        )
        if self.world.first:
            print(f"a sample, after the prompt {decode(prompt)!r}:\n{decode(tokens[len(prompt) :])}", flush=True)

    @functools.cached_property
    def config(self) -> GPT:
        """The model's options, with the vocabulary of the data. Raises RecipeError where the two do not fit."""
        source = self._source()
        num_tokens = getattr(source, "vocab_size", None)
        if num_tokens is None:
            raise RecipeError(
                f"a language model needs tokens, and data {self.recipe.data.name!r} has none; use text or tokens"
            )
        options: GPT = named_model(self.recipe, GPT)
        if source.tokens_per_sample > options.max_len:
            raise RecipeError(
                f"model.max_len is {options.max_len}, but the data has sequences of {source.tokens_per_sample} tokens; "
                f"use at least {source.tokens_per_sample}, or shorter sequences"
            )
        return options.with_vocabulary(num_tokens)

    def _source(self) -> Source:
        """The training split, opened now where the run has not done so."""
        if self.train_source is None:
            self.train_source = self.build_source("train")
        assert self.train_source is not None, "a built-in source has a training split"
        return self.train_source
