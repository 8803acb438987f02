"""Micro-batches on the devices: rounds, in each of which every shard of the mesh computes on as many rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from unitrain.batch import MicroBatch
from unitrain.cursor import mix
from unitrain.errors import DataError
from unitrain.strategies._jax_mesh import DeviceMesh

_LOW = (1 << 32) - 1


class Round(NamedTuple):
    """Rows for every shard of the mesh."""

    arrays: dict[str, jax.Array]  # global, rows first, cut by shards
    rows: int  # of one shard
    real: int  # of this rank's shards; those behind it hold rows that must weigh nothing


class Placed(dict[str, NDArray[Any]]):
    """This rank's rows as they came, and beside them, on the devices, in rounds."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], rounds: list[Round]) -> None:
        super().__init__(arrays)
        self.rounds = rounds


class Group(NamedTuple):
    """Rounds of one shape, which one loop on the devices runs through."""

    arrays: tuple[dict[str, jax.Array], ...]  # a round each
    facts: jax.Array  # (rounds, shards, 3) uint32: high and low half of the random key, and 1 where rows count


def place(arrays: Mapping[str, NDArray[Any]], mesh: DeviceMesh) -> Placed:
    """Put a rank's rows on its devices. Raises DataError for whole numbers that 32 bits cannot hold."""
    arrays = {name: _narrowed(name, np.asarray(array)) for name, array in arrays.items()}
    number = len(next(iter(arrays.values())))
    each, rest = divmod(number, mesh.local_shards)
    rounds = []
    if each:
        rounds.append(_round(arrays, range(each * mesh.local_shards), each, mesh.local_shards, mesh))
    if rest:  # as many shards get a row more, and the others one that weighs nothing
        rounds.append(_round(arrays, range(number - rest, number), 1, rest, mesh))
    return Placed(arrays, rounds)


def _round(arrays: Mapping[str, NDArray[Any]], rows: range, each: int, real: int, mesh: DeviceMesh) -> Round:
    chosen = {name: array[rows.start : rows.stop] for name, array in arrays.items()}
    if fillers := mesh.local_shards - real:
        chosen = {name: np.concatenate([array, array[:1].repeat(fillers, axis=0)]) for name, array in chosen.items()}
    return Round({name: mesh.place_rows(array) for name, array in chosen.items()}, each, real)


class Grouping:
    """Brings the micro-batches of an update into groups."""

    def __init__(self, mesh: DeviceMesh, *, random: bool) -> None:
        self.mesh, self.random = mesh, random
        self._known: dict[bytes, jax.Array] = {}

    def groups(self, micros: Iterable[MicroBatch]) -> tuple[Group, ...]:
        """Groups of the rounds of these micro-batches, in order of their first rounds."""
        groups: dict[Any, tuple[list[dict[str, jax.Array]], list[NDArray[np.uint32]]]] = {}
        for micro in micros:
            placed = micro.arrays if isinstance(micro.arrays, Placed) else place(micro.arrays, self.mesh)
            for number, found in enumerate(placed.rounds):
                shape = tuple((name, array.shape, array.dtype) for name, array in found.arrays.items())
                arrays, facts = groups.setdefault(shape, ([], []))
                arrays.append(found.arrays)
                facts.append(self._facts(micro, number, found.real))
        return tuple(Group(tuple(arrays), self._placed(facts)) for arrays, facts in groups.values())

    def _facts(self, micro: MicroBatch, number: int, real: int) -> NDArray[np.uint32]:
        """(shards of this rank, 3): see Group."""
        facts = np.zeros((self.mesh.local_shards, 3), np.uint32)
        if not micro.filler:
            facts[:real, 2] = 1
        if self.random:
            for shard in range(self.mesh.local_shards):
                key = micro.key if not (number or shard) else mix(micro.key, number, shard)
                facts[shard, :2] = key >> 32, key & _LOW
        return facts

    def _placed(self, facts: Sequence[NDArray[np.uint32]]) -> jax.Array:
        """On the devices; without random keys there are few different ones, and each is sent once."""
        table = np.stack(facts, axis=1)  # shards first, as rows are
        if self.random:
            return self.mesh.place_rows(table)
        known = self._known.get(table.tobytes())
        if known is None:
            known = self._known[table.tobytes()] = self.mesh.place_rows(table)
        return known


def _narrowed(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """JAX computes on 32 bits: refuse what it would cut off without a word."""
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8 and not jax.config.jax_enable_x64 and array.size:  # type: ignore[attr-defined]  # made at run time
        bounds = np.iinfo(np.int32 if array.dtype.kind == "i" else np.uint32)
        if array.min() < bounds.min or array.max() > bounds.max:
            raise DataError(
                f"{name!r} holds {array.max() if array.max() > bounds.max else array.min()}, which JAX cannot hold in "
                "32 bits; give smaller numbers, or set JAX_ENABLE_X64=1"
            )
    return array
