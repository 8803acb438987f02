"""The clock of a run, and all that follows from it: sample order, rank slices and random keys.

Everything here is a pure function of (seed, step), and of the windows of samples that the guard had skipped, if any.
Nothing else needs saving, and nothing depends on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 4  # Luby and Rackoff (1988): four Feistel rounds make a strong pseudo-random permutation
_MASK = (1 << 64) - 1
Window = tuple[int, int]  # positions in the sample order of all epochs, from the first up to, not with, the second

_WASTE = 1.1  # of computing filler rows, for parts that are larger


@dataclass(frozen=True)
class Cursor:
    """How far a run has come: optimizer steps, samples and tokens consumed."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def advanced(self, samples: int, tokens: int) -> Cursor:
        """The clock one step later."""
        return Cursor(self.step + 1, self.samples + samples, self.tokens + tokens)


def sample_ids(seed: int, step: int, global_batch: int, size: int, skipped: Sequence[Window] = ()) -> NDArray[np.int64]:
    """Ids of the samples of one global batch, shape (global_batch,), int64.

    The ids of all steps in order run through every sample of 0..size-1 once per epoch, in an order of its own
    each epoch, and leave out those in skipped windows. Costs O(global_batch) at any step and for any size.
    """
    return ids_at(positions(step, global_batch, skipped), seed, size)


def positions(step: int, global_batch: int, skipped: Sequence[Window] = ()) -> NDArray[np.int64]:
    """Positions in the sample order of all epochs that a step takes; `skipped` is ascending and disjoint."""
    found = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    for begin, end in skipped:
        found[found >= begin] += end - begin
    return found


def with_window(skipped: Iterable[Window], window: Window) -> tuple[Window, ...]:
    """Skipped windows and one more, ascending and disjoint."""
    merged: list[Window] = []
    for begin, end in sorted([*skipped, window]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return tuple(merged)


def ids_at(places: NDArray[np.int64], seed: int, size: int) -> NDArray[np.int64]:
    """Ids of the samples at these positions of the sample order of all epochs."""
    epochs, places = np.divmod(places, size)
    ids = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = permute(places[chosen], size, mix(seed, int(epoch)))
    return ids


def permute(places: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """A keyed permutation of range(size), evaluated at `places`.

    A balanced Feistel network over the next power of four, with cycle walking (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002) for sizes in between: at most four tries a place on average.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [np.uint64(mix(key, number)) for number in range(_ROUNDS)]
    values = places.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & low
    for key in keys:
        left, right = right, left ^ (scramble(right ^ key) & low)
    return (left << shift) | right


def scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), over an array."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mix(*parts: int) -> int:
    """One 64-bit key from whole numbers; every bit of every part counts."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def rank_rows(rows: int, rank: int, size: int) -> range:
    """The rows of a global batch that a rank holds: contiguous, as even as whole rows allow."""
    return range(rank * rows // size, (rank + 1) * rows // size)


def micro_rows(rows: range, num_micro: int) -> list[range]:
    """A rank's rows in `num_micro` consecutive parts; some are empty when rows are fewer."""
    count = len(rows)
    return [rows[number * count // num_micro : (number + 1) * count // num_micro] for number in range(num_micro)]


def num_microbatches(rows: int, size: int, micro_batch: int | None) -> int:
    """How many micro-batches every rank runs, so that none holds more than `micro_batch` rows.

    The same on all ranks: they must meet in the same collectives, whatever share of the rows they hold.
    """
    most = -(-rows // size)
    return 1 if micro_batch is None else max(1, -(-most // micro_batch))


def even_parts(rows: int, rank: int, size: int, micro_batch: int | None) -> list[tuple[range, bool]]:
    """A rank's (rows, filler) of a global batch in parts of which every rank has as many, of the same sizes.

    For backends that run one program on all ranks. A filler's rows are another rank's and must weigh nothing. All
    parts are of one size but the last, which holds what is left; a size that wastes little is chosen.
    """
    most = -(-rows // size) if micro_batch is None else min(micro_batch, -(-rows // size))
    cheapest = min(_even_cost(rows, size, part) for part in range(1, most + 1))
    part = max(part for part in range(1, most + 1) if _even_cost(rows, size, part) <= _WASTE * cheapest)
    parts = [range(begin, begin + part) for begin in range(0, rows - part + 1, part)]
    rounds = -(-len(parts) // size)
    chosen = parts[rank * rounds : (rank + 1) * rounds]
    found = [(own, False) for own in chosen] + [(parts[0], True)] * (rounds - len(chosen))
    if rest := rows % part:
        found.append((range(rows - rest, rows), rank != size - 1))
    return found


def _even_cost(rows: int, size: int, part: int) -> int:
    """Rows that each rank computes where parts have that size."""
    return -(-(rows // part) // size) * part + rows % part
