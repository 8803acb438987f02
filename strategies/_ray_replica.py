"""What an actor holds: one rank of the inner strategy, its engines and its data."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from unitrain import registry
from unitrain.batch import Batch, MicroBatch
from unitrain.checkpoint import CheckpointReader
from unitrain.cursor import Cursor, even_parts, mix, rank_rows
from unitrain.data.feed import Portion
from unitrain.data.source import Source
from unitrain.errors import CheckpointError, UserError
from unitrain.keras_backend import settle_keras
from unitrain.meeting import free_port
from unitrain.recipe import Recipe
from unitrain.strategies._ray_boxes import Chunk, Stored, StoredReader, chunked
from unitrain.strategy import Engine, HyperParameters, LoadReport, Metrics, Role, Strategy
from unitrain.trainer import Trainer, twins
from unitrain.world import World, forget_variables


class Place(NamedTuple):
    """Where an actor is."""

    node: str
    address: str
    gpus: tuple[str, ...]
    cores: int


class Rows(NamedTuple):
    """A global batch, as ranks elsewhere are told of it."""

    step: int
    ids: NDArray[np.int64]
    tokens: int
    source: int  # number of a source that the actors hold; -1: the rows themselves are here
    key: tuple[int, ...] = ()
    micros: tuple[MicroBatch, ...] = ()  # of the whole batch, made by hand


class Clock(NamedTuple):
    """What a Trainer has come to, for its twins."""

    token: str
    cursor: Cursor
    extra: dict[str, Any]


class Replica:
    """One rank. Every method but `place` and `free` is an act of all ranks together, in the same order."""

    def __init__(self) -> None:
        self._engines: dict[int, Engine] = {}
        self._portions: dict[int, Portion] = {}
        self._ahead: dict[tuple[int, ...], Future[list[MicroBatch]]] = {}
        self._newest: tuple[tuple[int, ...], list[MicroBatch]] | None = None
        self._pool = ThreadPoolExecutor(1, "unitrain-rows")

    def place(self) -> Place:
        """Where I am."""
        context: Any = ray.get_runtime_context()
        gpus = tuple(str(number) for number in context.get_accelerator_ids().get("GPU", []))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Place(context.get_node_id(), _address(), gpus, cores)

    def free(self) -> int:
        """A port on which nobody listens now."""
        return free_port(_address())

    def open(self, recipe: Recipe, world: World, gpus: Sequence[str]) -> None:
        """Join the other ranks, all GPUs of the node's actors being visible to each of them."""
        forget_variables("UNITRAIN_", "TORCHELASTIC_")  # our parent's parent is a rank of its own
        os.environ.update(_variables(world))
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        settle_keras(registry.framework_of(recipe.strategy))
        registry.prepare(recipe.strategy.name)
        self._world, self._recipe = world, recipe
        self._strategy: Strategy = registry.load("strategies", recipe.strategy.name)(recipe)
        self._strategy.open(world)

    def bind(self, number: int, role: Role, seed: int) -> None:
        """An engine of that number."""
        for trainer in twins().values():
            trainer.world = self._world
        engine = self._strategy.bind(role, seed)
        self._engines[number] = engine
        for trainer in twins().values():
            trainer.engines[role.name] = engine

    def add_source(self, number: int, source: Source | None, token: str, split: str, fingerprint: str) -> None:
        """The source of that number: the one given, or what the Trainer of that token builds for the split."""
        if source is None:
            source = twins()[token].build_source(split)
            found = "nothing" if source is None else source.fingerprint()
            if source is None or found != fingerprint:
                raise UserError(
                    f"an actor's build_source({split!r}) gave {found}, and the Trainer's gave {fingerprint}; let it "
                    "depend on the recipe alone, and give every node the same data"
                )
            if split == "train":
                twins()[token].train_source = source
            else:
                twins()[token].eval_source = source
        share, shares = self._strategy.data_share(self._world)
        self._portions[number] = Portion(
            source,
            micro_batch=self._recipe.train.micro_batch,
            rank=share,
            size=shares,
            place=self._strategy.place,
            even=self._strategy.even,
        )

    def expect(self, rows: Rows) -> None:
        """Load these behind what is done now; they are wanted next."""
        if rows.source >= 0:
            self._load_behind(rows)

    def update(self, number: int, rows: Rows, hp: HyperParameters, loss: str, clock: Clock | None) -> Any:
        """One optimizer step; what its StepOut reads, from rank 0."""
        self._set(clock)
        out = self._engines[number].update(self._batch(rows), hp, loss)
        values = out.read()
        return values if self._world.first else None

    def evaluate(self, number: int, batches: Sequence[Rows], loss: str, clock: Clock | None) -> Metrics | None:
        """Sums over all batches and ranks."""
        self._set(clock)
        found = self._engines[number].evaluate(self._sweep(batches), loss)
        return found if self._world.first else None

    def call(self, number: int, function: Callable[..., Any], args: Sequence[Any], clock: Clock | None) -> Any:
        """What the function says on rank 0."""
        self._set(clock)
        found = self._engines[number].call(function, *args)
        return found if self._world.first else None

    def boxes(self, number: int, kinds: Collection[str] | None) -> Iterator[Chunk]:
        """This rank's boxes."""
        yield from chunked(self._engines[number].shards(kinds))

    def reads(self, folder: str, digest: str) -> bool:
        """Whether I can read that very checkpoint."""
        try:
            return CheckpointReader(folder, verify="manifest").digest == digest
        except CheckpointError:
            return False

    def load_folder(self, number: int, folder: str, role: str, kinds: Collection[str] | None) -> LoadReport:
        """Become what a checkpoint says, read by each rank for itself."""
        return self._engines[number].load(CheckpointReader(folder).role(role), kinds)

    def load_stored(self, number: int, chunks: Sequence[Stored], kinds: Collection[str] | None) -> LoadReport:
        """Become what these boxes say."""
        return self._engines[number].load(StoredReader(chunks), kinds)

    def digest(self, number: int) -> dict[str, int]:
        """See Engine."""
        return self._engines[number].digest()

    def replicas(self, number: int) -> dict[str, list[int]]:
        """See Engine."""
        return self._engines[number].replicas()

    def memory_bytes(self) -> int:
        """Most memory that this rank held so far."""
        return self._strategy.memory_bytes()

    def peak_flops(self) -> float | None:
        """Of this rank's device."""
        return self._strategy.peak_flops()

    def _set(self, clock: Clock | None) -> None:
        if clock is not None and clock.token in twins():
            trainer: Trainer = twins()[clock.token]
            trainer.cursor, trainer.extra = clock.cursor, clock.extra

    def _batch(self, rows: Rows) -> Batch:
        if rows.source < 0:
            return Batch(rows.step, rows.ids, functools.partial(self._own, rows.micros), tokens=rows.tokens)
        return Batch(rows.step, rows.ids, functools.partial(self._loaded, rows), tokens=rows.tokens)

    def _loaded(self, rows: Rows) -> list[MicroBatch]:
        """A batch that several engines take is loaded once."""
        name = _name(rows)
        if self._newest is None or self._newest[0] != name:
            loading = self._ahead.pop(name, None)
            if loading is None:
                found = self._portions[rows.source].micro_batches(rows.ids, rows.key)
            else:
                found = loading.result()
            self._newest = name, found
        return self._newest[1]

    def _sweep(self, batches: Sequence[Rows]) -> Iterator[Batch]:
        """Each loaded while the one before is computed."""
        for number, rows in enumerate(batches):
            if number + 1 < len(batches) and batches[number + 1].source >= 0:
                self._load_behind(batches[number + 1])
            yield self._batch(rows)

    def _load_behind(self, rows: Rows) -> None:
        portion = self._portions.get(rows.source)
        newest = self._newest
        if portion is not None and _name(rows) not in self._ahead and (newest is None or newest[0] != _name(rows)):
            if len(self._ahead) > _MOST_AHEAD:
                self._ahead.clear()  # of steps that did not come
            self._ahead[_name(rows)] = self._pool.submit(portion.micro_batches, rows.ids, rows.key)

    def _own(self, micros: Sequence[MicroBatch]) -> list[MicroBatch]:
        """This rank's part of micro-batches of the whole batch."""
        share, shares = self._strategy.data_share(self._world)
        found = []
        for micro in micros:
            if self._strategy.even:
                parts = even_parts(micro.rows, share, shares, None)
            else:
                own = rank_rows(micro.rows, share, shares)
                parts = [(own, not own)]
            for part, filler in parts:
                chosen = slice(part.start, part.stop) if part else slice(0, 1)
                arrays = {name: np.asarray(array)[chosen] for name, array in micro.arrays.items()}
                key = mix(micro.key, part.start)
                placed = self._strategy.place(arrays)
                found.append(MicroBatch(placed, chosen.stop - chosen.start, key, filler=filler or micro.filler))
        return found


_MOST_AHEAD = 8


def _address() -> str:
    util: Any = ray.util
    found: str = util.get_node_ip_address()
    return found


def _name(rows: Rows) -> tuple[int, ...]:
    return rows.source, *rows.key, rows.step


def _variables(world: World) -> dict[str, str]:
    """What a rank finds in its environment under any starter, for libraries and users that look there."""
    host, _, port = world.coordinator.rpartition(":")
    found = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_size,
        "GROUP_RANK": world.node,
        "GROUP_WORLD_SIZE": world.nodes,
        **({"MASTER_ADDR": host, "MASTER_PORT": port} if host else {}),
        **({"OMP_NUM_THREADS": world.threads} if world.threads else {}),
    }
    return {name: str(value) for name, value in found.items()}
