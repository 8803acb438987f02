"""What strategy ray decides without any actor: refusals, who is which rank, whose rows, and what is kept."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unitrain import ArraySource, Batch, Recipe, Trainer, registry
from unitrain.data.feed import Feed, Portion
from unitrain.errors import CheckpointMismatch, UnknownName, UserError
from unitrain.recipe import LauncherRecipe, StrategyRecipe, TrainRecipe
from unitrain.recipe_file import check
from unitrain.run import Run
from unitrain.strategies._ray_refusals import Options, num_actors, ray, with_inner
from unitrain.strategy import Cluster, Problem, Shard
from unitrain.submission import job_of
from unitrain.trainer import twins

pytestmark = pytest.mark.fast
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'unitrain[ray]'")


def recipe(nproc: int = 2, **options: Any) -> Recipe:
    return Recipe(
        trainer="tests:Mine",
        train=TrainRecipe(global_batch=10, micro_batch=2, steps=3),
        strategy=StrategyRecipe(name="ray", options=options),
        launcher=LauncherRecipe(nproc=nproc),
    )


def problems(given: Recipe) -> list[Problem]:
    return ray(given, Cluster(nodes=1, nproc=1))


# --- options


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"iner": "ddp"}, "did you mean 'inner'?"),
        ({"actors": 0}, "strategy.options.actors is 0; give at least 1"),
        ({"actors": "2"}, "strategy.options.actors is '2'; give a int"),
        ({"actors": True}, "strategy.options.actors is True"),
        ({"silent_seconds": float("nan")}, "strategy.options.silent_seconds is nan"),
        ({"placement": "pack"}, "use one of PACK, SPREAD"),
        ({"inner": "dpd"}, "did you mean 'ddp'?"),
        ({"inner": "ray"}, "is 'ray' itself"),
        ({"inner": "horovod"}, "strategy horovod cannot run in actors"),
        ({"min_actors": 3}, "strategy.options.min_actors is 3 of 2 actors; give a number from 1 to 2"),
        ({"actors": 11}, "11 actors cannot share a batch of 10 samples"),
        ({"inner": "single"}, "single"),
        ({"inner": "fsdp2", "inner_options": {"shard_size": 3}}, "shard_size"),
        ({"inner_options": {"bucket": 1}}, "bucket"),
        ({"inner_options": 3}, "strategy.options.inner_options is 3"),
    ],
)
def test_a_wrong_option_is_one_clear_sentence(options: dict[str, Any], complaint: str) -> None:
    found = problems(recipe(**options))
    assert found, options
    assert complaint in f"{found[0].what}; {found[0].instead}"


@pytest.mark.parametrize("inner", ["ddp", "fsdp2"])
def test_what_the_inner_strategy_can_is_not_refused(inner: str) -> None:
    assert problems(recipe(inner=inner, placement="SPREAD", address=None, gpus=0.5, cpus=2)) == []


def test_the_fewest_ranks_are_said_in_the_strategys_words() -> None:
    given = recipe().replace(launcher=LauncherRecipe(nproc=2, options={"min_nproc": 1}))
    assert "set strategy.options.min_actors" in problems(given)[0].instead


def test_options_have_the_names_that_are_checked() -> None:
    from unitrain.strategies import _ray_refusals

    assert set(_ray_refusals._KINDS) == set(Options.__dataclass_fields__)


# --- how many processes, and of what framework


def test_the_launcher_starts_one_process_and_the_actors_are_as_many_as_its_ranks() -> None:
    given = recipe().replace(launcher=LauncherRecipe(nodes=2, nproc=3))
    job = job_of(Run(Path("runs/x")), given)
    assert (job.nodes, job.nproc) == (1, 1)
    assert num_actors(given) == 6
    assert num_actors(recipe(nproc=3, actors=4)) == 4


def test_the_framework_is_that_of_the_inner_strategy() -> None:
    assert registry.framework_of(StrategyRecipe(name="ray")) == "torch"
    assert registry.framework_of(StrategyRecipe(name="ray", options={"inner": "jax"})) == "jax"
    assert registry.framework_of(StrategyRecipe(name="tensorflow")) == "tensorflow"
    inner = registry.inner(StrategyRecipe(name="ray", options={"inner": "fsdp2", "inner_options": {"cpu_offload": 1}}))
    assert inner == StrategyRecipe(name="fsdp2", options={"cpu_offload": 1})
    with pytest.raises(UnknownName, match="did you mean 'jax'"):
        registry.inner(StrategyRecipe(name="ray", options={"inner": "jaxx"}))


def test_a_launch_is_refused_without_importing_ray() -> None:
    with pytest.raises(UserError, match="is 'ray' itself"):
        check(recipe(inner="ray").replace(trainer="unitrain.tasks:Classifier"))


# --- Trainers in several processes


class Mine(Trainer):
    """Made with an argument of its own."""

    def __init__(self, recipe: Recipe, width: int = 1, **keywords: Any) -> None:
        super().__init__(recipe, **keywords)
        self.width = width

    def loss(self, model: Any, batch: Any) -> Any:
        return self.width


@needs_ray
def test_a_trainer_in_another_process_is_one_made_anew_for_the_strategy_there() -> None:
    from ray import cloudpickle

    trainer = Mine(recipe(inner="fsdp2"), width=3)
    there = pickle.loads(cloudpickle.dumps((trainer.loss, trainer)))
    twin = there[1]
    assert twin is not trainer
    assert there[0].__self__ is twin, "all that comes of one Trainer belongs to one twin"
    assert pickle.loads(cloudpickle.dumps(trainer)) is twin, "also what comes later"
    assert twins()[trainer.token] is twin
    assert (twin.width, twin.recipe.strategy.name) == (3, "fsdp2")
    other = pickle.loads(
        cloudpickle.dumps(Mine(recipe().replace(strategy=StrategyRecipe(name="fsdp2")), strategy="ray"))
    )
    assert other is not twin
    assert other.recipe.strategy.name == "ddp"


# --- rows


@pytest.mark.parametrize("even", [False, True])
def test_ranks_elsewhere_get_the_very_micro_batches_of_ranks_here(even: bool) -> None:
    source = ArraySource(x=np.arange(33, dtype=np.float32), y=np.arange(33, dtype=np.float32))
    shape: dict[str, Any] = {"seed": 3, "global_batch": 10, "micro_batch": 2}
    driver = Feed(source, rank=0, size=1, place=dict, elsewhere=True, **shape)
    portion: dict[str, Any] = {"micro_batch": 2, "place": dict, "even": even}
    for rank in range(3):
        here = Feed(source, rank=rank, size=3, place=dict, even=even, **shape)
        there = Portion(source, rank=rank, size=3, **portion)
        pairs = [(here.batch(step), driver.batch(step)) for step in (0, 1, 5)]
        pairs += list(zip(here.sweep(), driver.sweep(), strict=True))
        for local, told in pairs:
            assert told.origin is not None
            assert (local.step, local.tokens, local.ids.tolist()) == (told.step, told.tokens, told.ids.tolist())
            same(local.micro(), there.micro_batches(told.ids, told.origin.key))
        here.close()
    driver.close()


def test_the_driver_loads_no_row_unless_it_is_asked() -> None:
    class Watched(ArraySource):
        fetched = 0

        def fetch(self, ids: Any) -> Mapping[str, Any]:
            self.fetched += 1
            return super().fetch(ids)

    source = Watched(x=np.arange(30))
    feed = Feed(source, seed=0, global_batch=10, micro_batch=None, rank=0, size=1, place=dict, elsewhere=True)
    batches: list[Batch] = [feed.batch(0), feed.batch(1), *feed.sweep()]
    assert source.fetched == 0
    assert sorted(batches[0].micro()[0].arrays["x"].tolist()) == sorted(batches[0].ids.tolist())
    feed.close()


@needs_ray
def test_rows_made_by_hand_are_shared_among_the_ranks() -> None:
    from unitrain.batch import MicroBatch
    from unitrain.strategies._ray_replica import Replica

    micros = [MicroBatch({"x": np.arange(5)}, 5, 11), MicroBatch({"x": np.arange(5, 6)}, 1, 12)]
    seen = []
    for rank in range(2):
        replica = Replica()
        replica._strategy, replica._world = Alone(rank, 2), None  # type: ignore[assignment]
        own = replica._own(micros)
        seen += [micro.arrays["x"].tolist() for micro in own if not micro.filler]
        assert len(own) == 2, "as many on every rank"
    assert sorted(number for rows in seen for number in rows) == [0, 1, 2, 3, 4, 5]


class Alone:
    """What of a strategy places rows."""

    even = False

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def data_share(self, world: Any) -> tuple[int, int]:
        return self.rank, self.size

    def place(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        return arrays


def same(here: Any, there: Any) -> None:
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert (one.rows, one.key, one.filler) == (other.rows, other.key, other.filler)
        assert {name: array.tolist() for name, array in one.arrays.items()} == {
            name: array.tolist() for name, array in other.arrays.items()
        }


# --- ranks and boxes


@needs_ray
def test_actors_of_one_node_are_local_ranks_of_it() -> None:
    from unitrain.strategies._ray_crew import worlds_of
    from unitrain.strategies._ray_replica import Place

    places = [Place(node, "127.0.0.1", (), 8) for node in ("b", "b", "a")]
    worlds = worlds_of(places, "127.0.0.1:1234", lambda place, beside: place.cores // beside)
    found = [(w.rank, w.local_rank, w.local_size, w.node, w.nodes, w.threads) for w in worlds]
    assert found == [(0, 0, 2, 0, 2, 4), (1, 1, 2, 0, 2, 4), (2, 0, 1, 1, 2, 8)]
    assert {(world.size, world.coordinator) for world in worlds} == {(3, "127.0.0.1:1234")}


@needs_ray
def test_any_box_is_read_from_chunks_of_any_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    from unitrain.strategies import _ray_boxes as boxes

    monkeypatch.setattr(boxes, "CHUNK_BYTES", 60)
    monkeypatch.setattr(boxes.ray, "get", lambda ref, timeout: ref)
    whole = np.arange(24, dtype=np.float32).reshape(6, 4)

    def shards() -> Iterator[Shard]:
        for row in range(0, 6, 2):
            yield Shard("w", "param", "float32", (6, 4), (row, 0), whole[row : row + 2])
        yield Shard("s", "buffer", "int64", (), (), np.array(7))

    chunks = list(boxes.chunked(shards()))
    assert len(chunks) == 3, "the last row and the scalar go together"
    reader = boxes.StoredReader(boxes.Stored(chunk.labels, chunk) for chunk in chunks)
    assert reader.tensors["param", "w"].shape == (6, 4)
    assert reader.read("param", "w", (1, 1), (4, 2)).tolist() == whole[1:5, 1:3].tolist()
    assert reader.read("buffer", "s", (), ()).item() == 7
    with pytest.raises(CheckpointMismatch, match="has no param 'x'"):
        reader.read("param", "x", (0,), (1,))


def test_inner_recipes_keep_everything_else() -> None:
    given = recipe(inner="fsdp2")
    assert with_inner(given) == given.replace(strategy=StrategyRecipe(name="fsdp2", options={}))
