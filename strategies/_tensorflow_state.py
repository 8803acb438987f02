"""State of a TensorFlow model and its optimizer, in and out: a rank holds the whole and writes its share of rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from unitrain.cursor import rank_rows
from unitrain.digest import box_digest
from unitrain.errors import CheckpointMismatch
from unitrain.models.layout import Turn
from unitrain.strategies._tensorflow_models import Bound
from unitrain.strategies._tensorflow_optimizer import Optimizer
from unitrain.strategies._tensorflow_ranks import Ranks
from unitrain.strategy import LoadReport, Shard, ShardReader


class State:
    """All tensors of one engine by (kind, canonical name)."""

    def __init__(self, bound: Bound, optimizer: Optimizer | None, ranks: Ranks) -> None:
        self.ranks = ranks
        self.places = [
            Place("param" if held.trained else "buffer", held.name, held.turn, held.variable) for held in bound.held
        ]
        if optimizer is not None:
            self.places += [Place(*slot) for slot in optimizer.slots()]

    def shards(self, kinds: Collection[str] | None) -> Iterator[Shard]:
        """This rank's rows of every tensor."""
        for place in self.places:
            if kinds is None or place.kind in kinds:
                box = self._written(place)
                if box is not None:
                    data, offset = box
                    yield Shard(place.name, place.kind, place.dtype, place.shape, offset, data)

    def load(self, reader: ShardReader, kinds: Collection[str] | None) -> LoadReport:
        """Fill every tensor that the checkpoint has."""
        present = {pair: info for pair, info in reader.tensors.items() if kinds is None or pair[0] in kinds}
        loaded: list[tuple[str, str]] = []
        missing: list[tuple[str, str]] = []
        vectors: dict[int, tuple[tf.Variable, NDArray[Any]]] = {}  # those of which each parameter has one number
        for place in self.places:
            pair = (place.kind, place.name)
            if kinds is not None and place.kind not in kinds:
                continue
            if pair not in present:
                missing.append(pair)
                continue
            shape = tuple(present[pair].shape)
            if shape != place.shape:
                raise CheckpointMismatch(
                    f"{place.kind} {place.name} has shape {shape} in the checkpoint and {place.shape} in this model; "
                    "resume with the recipe that wrote it"
                )
            loaded.append(pair)
            data = _from_bits(reader.read(place.kind, place.name, (0,) * len(shape), shape), present[pair].dtype)
            variable = place.variable
            if place.element is None:
                native = place.turn.to_native(data, tuple(variable.shape))
                variable.assign(native.astype(variable.dtype.as_numpy_dtype, copy=False))
            else:
                whole = vectors.setdefault(id(variable), (variable, variable.numpy()))[1]
                whole[place.element] = data
        for variable, whole in vectors.values():
            variable.assign(whole)
        return LoadReport(loaded, missing, sorted(set(present) - set(loaded)))

    def digest(self) -> dict[str, int]:
        """A hash of each parameter and buffer, to which each rank adds its rows. A collective."""
        sums: dict[str, int] = {}
        for place in self.places:
            if place.kind in ("param", "buffer"):
                box = self._written(place)
                sums[place.name] = 0 if box is None else box_digest(box[0], place.shape, box[1])
        found = self.ranks.meeting.gather(sums)
        return {name: sum(each[name] for each in found) % 2**64 for name in sums}

    def replicas(self) -> dict[str, list[int]]:
        """The digest of each tensor but buffers as each rank holds it, by rank. A collective."""
        mine = {
            f"{place.kind} {place.name}": box_digest(place.read(), place.shape, (0,) * len(place.shape))
            for place in self.places
            if place.kind != "buffer"
        }
        found = self.ranks.meeting.gather(mine)
        return {name: [each[name] for each in found] for name in mine}

    def _written(self, place: Place) -> tuple[NDArray[Any], tuple[int, ...]] | None:
        """The box that this rank contributes of a tensor, if any."""
        shape = place.shape
        if not shape or 0 in shape:
            return (place.read(), (0,) * len(shape)) if self.ranks.first else None
        rows = rank_rows(shape[0], self.ranks.rank, self.ranks.size)
        if not rows:
            return None
        return np.ascontiguousarray(place.read()[rows.start : rows.stop]), (rows.start, *(0 for _ in shape[1:]))


class Place(NamedTuple):
    """Where a named logical tensor lives on this rank."""

    kind: str
    name: str
    turn: Turn
    variable: tf.Variable
    element: int | None = None  # its place in a vector that holds one number of each parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical shape."""
        return () if self.element is not None else self.turn.canonical_shape(tuple(self.variable.shape))

    @property
    def dtype(self) -> str:
        """As a checkpoint names it."""
        name: str = self.variable.dtype.name
        return name

    def read(self) -> NDArray[Any]:
        """The whole in canonical axes, C-contiguous; bfloat16 as its bits."""
        # Shares the variable's memory, which its next update therefore leaves alone.
        array = np.asarray(self.variable.read_value())
        if self.element is not None:
            return array[self.element : self.element + 1].reshape(()).copy()
        turned = self.turn.to_canonical(array)
        return turned.view(np.uint16) if self.dtype == "bfloat16" else turned


def _from_bits(data: NDArray[Any], dtype: str) -> NDArray[Any]:
    return data.view(tf.bfloat16.as_numpy_dtype) if dtype == "bfloat16" else data
