"""What the built-in tasks share: a recipe names their model, and its options say how it begins."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import registry
from ..data.source import Source
from ..errors import RecipeError, Refused
from ..models.hf_config import HF
from ..recipe import Recipe
from ..schema import build
from ..strategy import Role
from ..trainer import Trainer

SUFFIXES = {"torch": "torch", "jax": "jax", "tensorflow": "tf"}  # framework -> how its files of a task or model end


class NamedModel(Trainer):
    """Builds the model of `config`. With adapters, they alone are trained and saved."""

    @functools.cached_property
    def config(self) -> Any:
        """The model's options, once they have proved to fit the data. Raises RecipeError."""
        raise NotImplementedError

    def build_model(self) -> Any:
        """See Trainer."""
        modules = self.config.modules
        if self.framework not in modules:
            able = [name for name, entry in registry.STRATEGIES.items() if entry.framework in modules]
            raise Refused(
                f"model {self.recipe.model.name!r} is not written for {self.framework}; use --strategy "
                f"{', '.join(able[1:3])} or another of {' or '.join(modules)}, or another model"
            )
        return registry.resolve(modules[self.framework])(self.config)

    def loss(self, model: Any, batch: Any) -> Any:
        """See Trainer. By the file of this task for the strategy's framework."""
        return self.native.loss(self, model, batch)

    @functools.cached_property
    def native(self) -> ModuleType:
        """What this task does in the strategy's framework."""
        module = f"{type(self)._task().__module__}_{SUFFIXES[self.framework]}"
        if importlib.util.find_spec(module) is None:
            raise Refused(
                f"{self.recipe.trainer} is written for torch alone; use --strategy ddp or fsdp2, not "
                f"{self.recipe.strategy.name}"
            )
        return importlib.import_module(module)

    @classmethod
    def _task(cls) -> type:
        """The class of this folder that the trainer's class is, or comes from."""
        return next(kind for kind in cls.__mro__ if kind.__module__.startswith(f"{__package__}."))

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """See Trainer."""
        values: NDArray[np.float32] = self.config.initial(name, shape, seed)
        return values

    def roles(self) -> dict[str, Role]:
        """See Trainer."""
        roles = super().roles()
        if self._adapts:
            roles["model"] = dataclasses.replace(roles["model"], checkpoint="trainable")
        return roles

    def identity(self) -> dict[str, Any]:
        """See Trainer. Adapters belong to the weights that they were trained on."""
        return {"base model": self._base} if self._adapts else {}

    @property
    def _adapts(self) -> bool:
        return isinstance(self.config, HF) and self.config.lora is not None

    @functools.cached_property
    def _base(self) -> str:
        where = "" if self.config.path is None else f" in {self.config.path}"
        return f"{self.config.base_digest()}{where}"

    def _source(self) -> Source:
        """The training split, opened now where the run has not done so."""
        if self.train_source is None:
            self.train_source = self.build_source("train")
        assert self.train_source is not None, "a built-in source has a training split"
        return self.train_source

    def _check_tokens(self, options: Any, kind: str) -> None:
        """Raise RecipeError where the data has no tokens, or more in a row than the model accepts."""
        source = self._source()
        if getattr(source, "vocab_size", None) is None:
            raise RecipeError(f"{kind} needs tokens, and data {self.recipe.data.name!r} has none; use text or tokens")
        if options.max_len is not None and source.tokens_per_sample > options.max_len:
            raise RecipeError(
                f"model.max_len is {options.max_len}, but the data has sequences of {source.tokens_per_sample} tokens; "
                f"use at least {source.tokens_per_sample}, or shorter sequences"
            )


def named_model(recipe: Recipe, *kinds: type, task: str = "") -> Any:
    """The options of the recipe's model. Raises RecipeError where it is none that a trainer can train.

    `task` is the head that a model of transformers must have.
    """
    kind = registry.load("models", recipe.model.name)
    if kind not in kinds:
        raise RecipeError(
            f"{recipe.trainer} cannot train model {recipe.model.name!r}; "
            f"it trains {', '.join(known.__name__.lower() for known in kinds)}"
        )
    options = build(kind, recipe.model.options, "model")
    if isinstance(options, HF) and options.task != task:
        raise RecipeError(
            f"model.task is {options.task!r}, but {recipe.trainer} trains {task!r}; set model.task: {task}"
        )
    return options
