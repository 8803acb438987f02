"""Ray: the ranks of another strategy are actors, and the Trainer runs in the one process that controls them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from numpy.typing import NDArray

from unitrain import registry
from unitrain.batch import Batch
from unitrain.data.source import as_array
from unitrain.errors import UserError
from unitrain.recipe import Recipe
from unitrain.strategies import _ray_refusals
from unitrain.strategies._ray_boxes import store_all
from unitrain.strategies._ray_crew import Act, Crew
from unitrain.strategies._ray_refusals import num_actors
from unitrain.strategies._ray_replica import Clock, Rows
from unitrain.strategy import (
    Cluster,
    Engine,
    HyperParameters,
    LoadReport,
    Metrics,
    Problem,
    Role,
    Shard,
    ShardReader,
    StepOut,
    Strategy,
)
from unitrain.trainer import Trainer
from unitrain.world import World


class Ray(Strategy):
    """Options: see `_ray_refusals.Options`. Lost actors are replaced while the Trainer waits."""

    name: ClassVar[str] = "ray"
    elsewhere: ClassVar[bool] = True

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        inner = registry.inner(recipe.strategy).name
        registry.prepare(inner)
        self.framework = registry.load("strategies", inner).framework  # type: ignore[misc]  # of a class it is known, here it is the recipe's
        self.crew: Crew | None = None

    @classmethod
    def problems(cls, recipe: Recipe, cluster: Cluster) -> list[Problem]:
        """See Strategy."""
        return _ray_refusals.ray(recipe, cluster)

    def open(self, world: World) -> None:
        """See Strategy. The ranks meet each other; this process has but one of its own kind."""
        if world.size > 1:
            raise UserError(
                f"strategy ray has one process, and {world.size} were started; start one, and set "
                "strategy.options.actors"
            )
        self.crew = Crew(self.recipe, world, self._tell)
        self.crew.open()

    def bind(self, role: Role, seed: int) -> RayEngine:
        """See Strategy."""
        number = self._crew.bind((role, seed), role.name)
        return RayEngine(self._crew, number, role, self._sources)

    def place(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        """See Strategy. They stay on the host: the ranks place their own."""
        return dict(arrays)

    def data_share(self, world: World) -> tuple[int, int]:
        """See Strategy. Whoever asks here for rows gets all of them."""
        return 0, 1

    def num_ranks(self, world: World) -> int:
        """See Strategy."""
        return num_actors(self.recipe) if self.crew is None else self.crew.number

    def share(self, text: str) -> str:
        """See Strategy."""
        return text

    def barrier(self) -> None:
        """See Strategy."""
        self._crew.settle_all()

    def close(self) -> None:
        """See Strategy."""
        crew, self.crew = self.crew, None
        if crew is not None:
            crew.close()

    def memory_bytes(self) -> int:
        """See Strategy. Of the actor that holds most."""
        found: list[int] = self._crew.ask("memory_bytes", what="telling its memory")
        return max(found)

    def peak_flops(self) -> float | None:
        """See Strategy. Of all actors together."""
        found = self._peaks
        return None if None in found else sum(peak for peak in found if peak is not None)

    @functools.cached_property
    def _peaks(self) -> list[float | None]:
        return self._crew.ask("peak_flops", what="telling its device")

    @functools.cached_property
    def _sources(self) -> dict[int, tuple[Any, int]]:
        return {}  # id of a source -> the source, which keeps its id its own, and its number

    @property
    def _crew(self) -> Crew:
        assert self.crew is not None, "the strategy is open"
        return self.crew

    def _tell(self, event: str, line: str, **facts: Any) -> None:
        self.report(event, line, **facts)


class RayEngine(Engine):
    """An engine whose ranks are actors: each verb is one act of all of them."""

    def __init__(self, crew: Crew, number: int, role: Role, sources: dict[int, tuple[Any, int]]) -> None:
        self.crew, self.number, self.role = crew, number, role
        self._sources = sources
        self._trainer = _trainer_of(role)

    @property
    def model(self) -> Any:
        """Not here. Raises UserError."""
        raise UserError(
            f"the model of role {self.role.name!r} lives in the actors of strategy ray, not in this process; use "
            "engine.call(function, ...), which runs function(model, ...) there, or use it in a loss"
        )

    @model.setter
    def model(self, value: Any) -> None:
        raise UserError("the model of a role lives in the actors of strategy ray; it cannot be set")

    def update(self, batch: Batch, hp: HyperParameters, loss: str = "loss") -> RayStepOut:
        """See Engine."""
        rows = self._rows(batch)
        what = f"in update {batch.step + 1}"
        act = Act("update", (self.number, rows, hp, loss, self._clock()), what, self.number)
        self.crew.begin(act, rows)
        return RayStepOut(self.crew, act)

    def evaluate(self, batches: Iterable[Batch], loss: str = "loss") -> Metrics:
        """See Engine."""
        rows = [self._rows(batch) for batch in batches]
        found: Metrics = self._ask("evaluate", rows, loss, self._clock(), what="evaluating")
        return found

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """See Engine. What rank 0 returned; the others' is dropped."""
        return self._ask("call", function, args, self._clock(), what="in Engine.call")

    def shards(self, kinds: Collection[str] | None = None) -> Iterator[Shard]:
        """See Engine. Those of all actors: this process writes for all."""
        for chunk in self.crew.boxes(self.number, kinds):
            yield from chunk.shards()

    def load(self, reader: ShardReader, kinds: Collection[str] | None = None) -> LoadReport:
        """See Engine. Actors that see the checkpoint's folder read it themselves; others are sent what they need."""
        place = getattr(reader, "place", None)
        if place is not None:
            folder, role, digest = place
            if all(self.crew.ask("reads", folder, digest, what="looking for the checkpoint")):
                return self.crew.load(self.number, "load_folder", folder, role, kinds)
        return self.crew.load(self.number, "load_stored", store_all(reader), kinds)

    def digest(self) -> dict[str, int]:
        """See Engine."""
        found: dict[str, int] = self._ask("digest", what="hashing")
        return found

    def replicas(self) -> dict[str, list[int]]:
        """See Engine."""
        found: dict[str, list[int]] = self._ask("replicas", what="hashing")
        return found

    def _ask(self, method: str, *args: Any, what: str) -> Any:
        return self.crew.ask(method, self.number, *args, what=what, engine=self.number)[0]

    def _clock(self) -> Clock | None:
        trainer = self._trainer
        return None if trainer is None else Clock(trainer.token, trainer.cursor, trainer.extra)

    def _rows(self, batch: Batch) -> Rows:
        if batch.origin is None:
            micros = tuple(
                type(micro)(
                    {name: as_array(array) for name, array in micro.arrays.items()}, micro.rows, micro.key, micro.filler
                )
                for micro in batch.micro()
            )
            return Rows(batch.step, batch.ids, batch.tokens, -1, micros=micros)
        number = self._source(batch.origin.source)
        return Rows(batch.step, batch.ids, batch.tokens, number, key=batch.origin.key)

    def _source(self, source: Any) -> int:
        """The number by which the actors know a source: the Trainer's own ones they open themselves."""
        if id(source) not in self._sources:
            trainer = self._trainer
            split = token = ""
            if trainer is not None and any(source is own for own in (trainer.train_source, trainer.eval_source)):
                split = "train" if source is trainer.train_source else "eval"
                token = trainer.token
            sent = None if split else source
            number = self.crew.add_source(sent, token, split, source.fingerprint())
            self._sources[id(source)] = source, number
        return self._sources[id(source)][1]


class RayStepOut(StepOut):
    """What an update gave, once the actors have told."""

    def __init__(self, crew: Crew, act: Act) -> None:
        self._crew, self._act = crew, act

    @property
    def loss(self) -> float:
        """See StepOut."""
        return self.read()["loss"]

    def read(self) -> dict[str, float]:
        """See StepOut."""
        return dict(self._crew.settle(self._act)[0])


def _trainer_of(role: Role) -> Trainer | None:
    """The Trainer to which the role's callables belong, if any do."""
    for function in (role.model, role.initial, role.optimizer, *role.losses.values()):
        while isinstance(function, functools.partial):
            function = function.func
        owner = getattr(function, "__self__", None)
        if isinstance(owner, Trainer):
            return owner
    return None
