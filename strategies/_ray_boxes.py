"""Boxes of tensors on their way through Ray's object store, a bounded number of bytes at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from unitrain.checkpoint.container import ELEMENT_TYPES
from unitrain.errors import CheckpointMismatch
from unitrain.strategy import Shard, ShardReader, TensorInfo

CHUNK_BYTES = 32 << 20


class Label(NamedTuple):
    """A box without its data."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    box: tuple[int, ...]  # shape of the box


class Chunk(NamedTuple):
    """Some boxes; the unit in which they travel."""

    labels: list[Label]
    arrays: list[NDArray[Any]]

    def shards(self) -> Iterator[Shard]:
        """The boxes as an engine gives them."""
        for label, array in zip(self.labels, self.arrays, strict=True):
            yield Shard(label.name, label.kind, label.dtype, label.shape, label.offset, array)


class Stored(NamedTuple):
    """A chunk in the object store: what is in it, and where it is."""

    labels: list[Label]
    ref: Any


def chunked(shards: Iterable[Shard]) -> Iterator[Chunk]:
    """Copies of the boxes; a chunk is no larger than CHUNK_BYTES unless one box is."""
    chunk, size = Chunk([], []), 0
    for shard in shards:
        if chunk.arrays and size + shard.data.nbytes > CHUNK_BYTES:
            yield chunk
            chunk, size = Chunk([], []), 0
        label = Label(shard.name, shard.kind, shard.dtype, tuple(shard.shape), tuple(shard.offset), shard.data.shape)
        chunk.labels.append(label)
        chunk.arrays.append(np.array(shard.data, copy=True))
        size += shard.data.nbytes
    if chunk.arrays:
        yield chunk


def stored(chunk: Chunk) -> Stored:
    """Put a chunk into the store of this node."""
    return Stored(chunk.labels, ray.put(chunk))


def store_all(reader: ShardReader) -> list[Stored]:
    """Everything that a reader has, for processes that cannot read it themselves."""

    def whole() -> Iterator[Shard]:
        for (kind, name), info in reader.tensors.items():
            shape = tuple(info.shape)
            data = reader.read(kind, name, (0,) * len(shape), shape)
            yield Shard(name, kind, info.dtype, shape, (0,) * len(shape), data)

    return [stored(chunk) for chunk in chunked(whole())]


class StoredReader:
    """The ShardReader of chunks in the object store."""

    def __init__(self, chunks: Iterable[Stored]) -> None:
        self._boxes: dict[tuple[str, str], list[tuple[Label, Any, int]]] = {}
        for chunk in chunks:
            for number, label in enumerate(chunk.labels):
                self._boxes.setdefault((label.kind, label.name), []).append((label, chunk.ref, number))
        self._newest: tuple[Any, Chunk] | None = None

    @property
    def tensors(self) -> Mapping[tuple[str, str], TensorInfo]:
        """See ShardReader."""
        return {pair: TensorInfo(found[0][0].dtype, found[0][0].shape) for pair, found in self._boxes.items()}

    def read(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[Any]:
        """See ShardReader."""
        found = self._boxes.get((kind, name))
        if not found:
            raise CheckpointMismatch(f"what the actors had saved has no {kind} {name!r}")
        wanted = np.empty(shape, dtype=ELEMENT_TYPES[found[0][0].dtype].numpy)
        for label, ref, number in found:
            overlap = [
                (max(ours, theirs), min(ours + length, theirs + held))
                for ours, length, theirs, held in zip(offset, shape, label.offset, label.box, strict=True)
            ]
            if any(start >= stop for start, stop in overlap):
                continue
            here = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, offset, strict=True))
            there = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, label.offset, strict=True))
            wanted[here] = self._chunk(ref).arrays[number][there]
        return wanted

    def _chunk(self, ref: Any) -> Chunk:
        if self._newest is None or self._newest[0] != ref:
            self._newest = ref, ray.get(ref, timeout=_FETCH_SECONDS)
        return self._newest[1]


def flattened(chunks: Iterable[Iterable[Any]]) -> list[Any]:
    """One list of several."""
    return list(itertools.chain.from_iterable(chunks))


_FETCH_SECONDS = 300.0
