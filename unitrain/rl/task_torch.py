"""What the trainers of RL share: the recipe's `rl:`, records as data, and the weights that a run begins with."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import registry
from ..checkpoint import Saver
from ..data.feed import Feed
from ..data.records import Records, View
from ..data.source import Source
from ..errors import MissingExtra, RecipeError
from ..models.config import GPT
from ..models.hf_config import HF
from ..strategy import Role
from ..tasks.named import NamedModel, named_model
from .base import Base
from .recipe import RL, refuse_strategy, rl_recipe
from .report import plot, table
from .rows_torch import Rows


class RLTask(NamedModel):
    """`model:` is a gpt or hf (causal-lm); `data:` records; `rl:` the trainer's own keys. For torch strategies.

    The role `model` is what is trained, so that a run's checkpoint is exported, or begun from, as any other's.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}  # of `rl:`
    view: ClassVar[type[View] | None] = None  # how the trainer looks at the records
    packs: ClassVar[bool] = False  # several examples in a row, if asked

    @functools.cached_property
    def rl(self) -> RL:
        """The keys of `rl:`, with this trainer's defaults. Raises RecipeError."""
        return rl_recipe(self.recipe.rl, self.defaults)

    @functools.cached_property
    def config(self) -> GPT | HF:
        """The model's options. Raises RecipeError where they do not fit the data."""
        options: GPT | HF = named_model(self.recipe, GPT, HF, task="causal-lm")
        self._check_tokens(options, type(self).__name__)
        return options.with_vocabulary(self.records("train").vocab_size)

    def build_source(self, split: str) -> Source | None:
        """See Trainer."""
        source = super().build_source(split)
        if source is None:
            return None
        if not isinstance(source, Records):
            raise RecipeError(f"{self.recipe.trainer} trains on data {{name: records}}, not {self.recipe.data.name!r}")
        return source if self.view is None else self.view(source)

    def records(self, split: str) -> Records:
        """The rows of a split."""
        source = self._source() if split == "train" else self.eval_source
        found = source.records if isinstance(source, View) else source
        assert isinstance(found, Records), "see build_source"
        return found

    def roles(self) -> dict[str, Role]:
        """See Trainer."""
        refuse_strategy(self.recipe)
        if self.rl.packing and not self.packs:  # a mistake in `rl:` is told before anything starts
            raise RecipeError(f"rl.packing is for SFT alone; take it out for {self.recipe.trainer}")
        return super().roles()

    def placed(self, roles: dict[str, Role]) -> dict[str, Role]:
        """The roles, each with the strategy that `rl.strategies` names for it. Raises RecipeError for absent ones."""
        for name, strategy in self.rl.strategies.items():
            if name not in roles:
                raise RecipeError(
                    f"rl.strategies.{name} is set, but this run has the roles {', '.join(roles)}; take it out"
                )
            roles[name] = dataclasses.replace(roles[name], strategy=strategy)
        return roles

    def reference(self) -> Role:
        """What the run begins with, frozen: without adapters, and in no checkpoint, since it can be had again."""
        config = dataclasses.replace(self.config, lora=None) if isinstance(self.config, HF) else self.config
        frozen = dataclasses.replace(config, dropout=0.0) if isinstance(config, GPT) else config

        def build() -> Any:
            return built(frozen).requires_grad_(False)

        def initial(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
            # The policy's seed and names: the two begin alike.
            return self._first(self.config, self._with_adapter(name), shape, self.recipe.train.seed)

        return Role(model=build, initial=initial, checkpoint="trainable")

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """See Trainer."""
        return self._first(self.config, name, shape, seed)

    def identity(self) -> dict[str, Any]:
        """See Trainer. A reference that is not saved must be the same when a run is resumed."""
        return super().identity() | ({} if self.base is None else {"rl.base": self.base.digest})

    @functools.cached_property
    def base(self) -> Base | None:
        """The checkpoint that the run begins with."""
        return None if self.rl.base is None else Base(self.rl.base, "rl.base")

    @functools.cached_property
    def rows(self) -> Rows:
        """This rank's share of rows."""
        return Rows(self.engines["model"], self._control, self.world, self.recipe.train.micro_batch)

    @contextlib.contextmanager
    def _session(self) -> Iterator[tuple[Feed, Saver]]:
        """See Trainer. What the task opens ends with the run, also where it fails."""
        with contextlib.ExitStack() as self.opened, super()._session() as session:
            for name in self.of_a_session:
                self.__dict__.pop(name, None)
            yield session

    of_a_session: ClassVar[tuple[str, ...]] = ("rows",)  # cached properties that hold its engines

    def finish(self) -> None:
        """Print a table and draw a plot, where the run had rewards."""
        if not self.world.first or self.run is None:
            return
        records = self.run.metrics()
        if not (text := table(records)):
            return
        print(text, flush=True)
        path = Path(self.run.folder) / "rl.png"
        try:
            plot(path, self.recipe.name, records)
        except MissingExtra as error:
            print(f"note: no plot: {error}", flush=True)
        else:
            print(f"plot: {path}", flush=True)

    def _with_adapter(self, name: str) -> str:
        """How the policy calls a parameter of the model without adapters."""
        if not self._adapts:
            return name
        layer, _, leaf = name.rpartition(".")
        adapted = f"{layer}.base_layer.{leaf}"
        return adapted if adapted in self._parameters else name

    @functools.cached_property
    def _parameters(self) -> Mapping[str, tuple[int, ...]]:
        found: Mapping[str, tuple[int, ...]] = registry.resolve("unitrain.models.hf_torch:parameters")(self.config)
        return found

    def _first(self, config: GPT | HF, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        found = None if self.base is None else self.base.value(name, shape)
        return config.initial(name, shape, seed) if found is None else found


def built(config: GPT | HF) -> Any:
    """The module of a model's options."""
    return registry.resolve(config.modules["torch"])(config)
