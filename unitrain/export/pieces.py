"""What an exported folder is made of: tensors that are computed some rows at a time, and small files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.container import ELEMENT_TYPES
from ..strategy import ShardReader

ROWS_BYTES = 8 << 20  # of fp32 numbers that are in memory at once, or one row where that is more


class Tensor(NamedTuple):
    """One tensor of the exported folder. `rows(start, stop)` gives a part; without dimensions (0, 1) is all of it."""

    name: str
    dtype: str  # as it will be stored
    shape: tuple[int, ...]
    rows: Callable[[int, int], NDArray[Any]]

    def parts(self) -> Iterator[NDArray[Any]]:
        """The whole, in order."""
        if not math.prod(self.shape):
            return
        length = self.shape[0] if self.shape else 1
        step = max(1, ROWS_BYTES // max(1, 4 * math.prod(self.shape[1:])))
        for start in range(0, length, step):
            yield self.rows(start, min(start + step, length))

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ELEMENT_TYPES[self.dtype].numpy.itemsize


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that an export writes."""

    tensors: Sequence[Tensor]
    stem: str = "model"  # of the files with tensors
    files: Mapping[str, bytes] = field(default_factory=dict)
    copies: Sequence[Path] = ()  # files to put beside them under their own names
    what: str = ""  # for people


def read_rows(reader: ShardReader, kind: str, name: str, start: int, stop: int, first: int = 0) -> NDArray[Any]:
    """Rows of a tensor of a checkpoint, counted from row `first`."""
    shape = reader.tensors[kind, name].shape
    if not shape:
        return reader.read(kind, name, (), ())
    zeros = (0,) * (len(shape) - 1)
    return reader.read(kind, name, (first + start, *zeros), (stop - start, *shape[1:]))


def as_stored(reader: ShardReader, kind: str, name: str, dtype: str, *, exported: str = "") -> Tensor:
    """A tensor of the checkpoint; floating-point numbers in the dtype that was asked for."""
    info = reader.tensors[kind, name]
    stored = dtype if info.dtype in ("float32", "float64", "float16", "bfloat16") else info.dtype

    def rows(start: int, stop: int) -> NDArray[Any]:
        return read_rows(reader, kind, name, start, stop)

    return Tensor(exported or name, stored, info.shape, converted(rows, info.dtype, stored))


def converted(rows: Callable[[int, int], NDArray[Any]], have: str, want: str) -> Callable[[int, int], NDArray[Any]]:
    """The same rows in another floating-point dtype; bfloat16 as its bits."""
    if have == want:
        return rows

    def changed(start: int, stop: int) -> NDArray[Any]:
        values = rows(start, stop)
        return to_dtype(from_bfloat16(values) if have == "bfloat16" else values, want)

    return changed


def to_dtype(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Floating-point numbers as a dtype, rounded to the nearest."""
    if dtype == "bfloat16":
        return to_bfloat16(values.astype(np.float32, copy=False))
    return values.astype(ELEMENT_TYPES[dtype].numpy, copy=False)


def from_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """The numbers whose bfloat16 bits these are."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even, as torch rounds; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
