"""State of the jax strategy in and out: each rank reads and writes the boxes that its own devices hold, no more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax import Array
from jax.sharding import Sharding
from numpy.typing import NDArray

from unitrain.digest import box_digest
from unitrain.errors import CheckpointMismatch
from unitrain.models.layout import Turn
from unitrain.strategy import LoadReport, Shard, ShardReader


class Place(NamedTuple):
    """Where a named logical tensor lives."""

    kind: str
    name: str
    array: Array  # global
    turn: Turn  # from the array's axes to the canonical ones
    put: Callable[[Array], None]  # takes its successor
    element: int | None = None  # the tensor is one number of the array, a vector

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical."""
        return () if self.element is not None else self.turn.canonical_shape(self.array.shape)


class Box(NamedTuple):
    """Part of a canonical tensor."""

    offset: tuple[int, ...]
    data: NDArray[Any]  # C-contiguous, in the framework's own dtype


LocalBoxes = Callable[[Array], Iterable[tuple[tuple[int, ...], NDArray[Any]]]]


def write(places: Iterable[Place], local_boxes: LocalBoxes, *, first: bool) -> Iterator[Shard]:
    """What this rank contributes to a checkpoint."""
    for place in places:
        for box in boxes(place, local_boxes, first=first):
            yield Shard(place.name, place.kind, str(place.array.dtype), place.shape, box.offset, _bits(box.data))


def boxes(place: Place, local_boxes: LocalBoxes, *, first: bool) -> Iterator[Box]:
    """This rank's canonical boxes of a tensor."""
    if place.element is not None:
        if first:
            yield Box((), np.asarray(place.array.addressable_data(0))[place.element].reshape(()))
        return
    for offset, data in local_boxes(place.array):
        for piece in place.turn.pieces(place.array.shape, offset, data.shape):
            yield Box(piece.offset, place.turn.piece_to_canonical(data, piece))


def digest_of(place: Place, local_boxes: LocalBoxes, *, first: bool) -> int:
    """This rank's part of a tensor's digest."""
    found = boxes(place, local_boxes, first=first)
    return sum(box_digest(_bits(box.data), place.shape, box.offset) for box in found) % 2**64


def replica_digest_of(place: Place) -> int | None:
    """The digest of a tensor that every rank holds whole, as this rank holds it; None for others."""
    if place.element is not None or not place.array.is_fully_replicated:
        return None
    data = _bits(np.asarray(place.array.addressable_data(0)))
    return box_digest(data, data.shape, (0,) * data.ndim)


def load(places: Sequence[Place], reader: ShardReader, kinds: Collection[str] | None) -> LoadReport:
    """Fill the places from a checkpoint."""
    present = {pair: info for pair, info in reader.tensors.items() if kinds is None or pair[0] in kinds}
    loaded: list[tuple[str, str]] = []
    missing: list[tuple[str, str]] = []
    vectors: dict[int, tuple[Place, NDArray[Any]]] = {}  # by the array's identity: elements come one by one
    for place in places:
        pair = (place.kind, place.name)
        if kinds is not None and place.kind not in kinds:
            continue
        if pair not in present:
            missing.append(pair)
            continue
        info = present[pair]
        if tuple(info.shape) != place.shape:
            raise CheckpointMismatch(
                f"{place.kind} {place.name} has shape {tuple(info.shape)} in the checkpoint and {place.shape} in this "
                "model; resume with the recipe that wrote it"
            )
        loaded.append(pair)
        if place.element is not None:
            known = (place, np.array(place.array.addressable_data(0)))
            vectors.setdefault(id(place.array), known)[1][place.element] = reader.read(*pair, (), ())
        else:
            place.put(_read(place, reader, info.dtype))
    for place, values in vectors.values():
        place.put(from_parts(values.shape, place.array.sharding, values.__getitem__))
    return LoadReport(loaded, missing, sorted(set(present) - set(loaded)))


def from_parts(shape: tuple[int, ...], sharding: Sharding, part: Callable[[tuple[slice, ...]], NDArray[Any]]) -> Array:
    """A global array of what `part` gives for the index of each box that this rank's devices hold."""

    def whole(index: tuple[slice, ...] | None) -> NDArray[Any]:
        assert index is not None, "a sharding of ours says where each part lies"
        return np.require(part(index), requirements="C")  # np.ascontiguousarray would give a scalar an axis

    return jax.make_array_from_callback(shape, sharding, whole)


def _read(place: Place, reader: ShardReader, dtype: str) -> Array:
    turn, whole, to = place.turn, place.array.shape, place.array.dtype
    known: dict[tuple[int, ...], NDArray[Any]] = {}

    def part(index: tuple[slice, ...]) -> NDArray[Any]:
        bounds = [each.indices(size) for each, size in zip(index, whole, strict=True)]
        offset = tuple(begin for begin, _, _ in bounds)
        if offset not in known:
            box = known[offset] = np.empty([end - begin for begin, end, _ in bounds], to)
            for piece in turn.pieces(whole, offset, box.shape):
                data = reader.read(place.kind, place.name, piece.offset, piece.shape)
                data = data.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else data
                turn.put_piece(box, piece, data.astype(to))
        return known[offset]

    return from_parts(whole, place.array.sharding, part)


def _bits(data: NDArray[Any]) -> NDArray[Any]:
    """numpy knows no bfloat16: its bits travel as uint16."""
    return data.view(np.uint16) if data.dtype == ml_dtypes.bfloat16 else data
