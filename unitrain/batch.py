"""A global batch: the ids of all its samples, and a lazy view of this rank's share in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass takes."""

    arrays: Mapping[str, Any]  # named arrays of the framework, rows first
    rows: int
    key: int  # 64-bit random key; a pure function of seed, step and place in the global batch
    filler: bool = False  # a row that belongs to nobody, to meet the other ranks: its weight is 0


class Origin(NamedTuple):
    """Where the rows of a batch come from, for ranks that fetch their own."""

    source: Any  # a Source: its fetch(ids) gives the rows
    key: tuple[int, ...]  # with the place of a micro-batch's first row it makes that one's key


class Batch:
    """One global batch. Engines whose ranks live elsewhere use `ids` and `origin`; the others use `micro()`."""

    def __init__(
        self,
        step: int,
        ids: NDArray[np.int64],
        load: Callable[[], Sequence[MicroBatch]],
        *,
        tokens: int = 0,
        origin: Origin | None = None,
    ) -> None:
        self.step = step
        self.ids = ids  # of the whole global batch, shape (global_batch,), int64
        self.tokens = tokens  # of the whole global batch, as the source counts them
        self.origin = origin  # None: rows made by hand, which only `micro` knows
        self._load = load
        self._micro: Sequence[MicroBatch] | None = None

    def micro(self) -> Sequence[MicroBatch]:
        """This rank's micro-batches, as many on every rank; waits for the loader if it is behind."""
        if self._micro is None:
            self._micro = self._load()
        return self._micro

    def __len__(self) -> int:
        return len(self.ids)
