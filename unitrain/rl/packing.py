"""Several short texts in one row: which go together, and rows in which they do not see each other.

A batch of padded rows computes mostly padding where texts are short. Packed, a row holds as many whole texts as fit;
`segments` says which text a token belongs to, `positions` where it stands in it, and attention stays within a text.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.records import Records, View


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Packs of at most `room`, as numbers of the lengths: the longest first, each where the least room is left.

    Best fit decreasing: at most 11/9 of the fewest packs possible and 6/9 more (Johnson et al., 1974; Dosa, 2007).
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, which pack), in order
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        assert length <= room, f"a text of {length} tokens, but there is room for {room}: texts are cut before"
        place = bisect.bisect_left(free, (length, -1))
        left, pack = free.pop(place) if place < len(free) else (room, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(number)
        bisect.insort(free, (left - length, pack))
    return packs


class Packed(View):
    """Packs of prompts with completions; a sample of the run is a pack.

    `tokens`, `targets`, `weight` as Records has them; `segments` (rows, seq_len), int64: from 0 on, -1 for padding; and
    `positions`, int64.
    """

    def __init__(self, records: Records) -> None:
        super().__init__(records)
        self.room = records.seq_len

    @functools.cached_property
    def packs(self) -> list[list[int]]:
        """Rows of the records that share a row."""
        return best_fit([len(self._text(number)[0]) - 1 for number in range(len(self.records))], self.room)

    def __len__(self) -> int:
        return len(self.packs)

    def fingerprint(self) -> str:
        """The records', packed."""
        return f"packed:{len(self)}:{super().fingerprint()}"

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """`tokens`, `targets`, `weight`, `segments` and `positions`."""
        shape = (len(ids), self.room)
        pad = self.records.tokenizer.pad
        found: dict[str, NDArray[Any]] = {
            "tokens": np.full(shape, pad, dtype=np.int64),
            "targets": np.full(shape, pad, dtype=np.int64),
            "weight": np.zeros(shape, dtype=np.float32),
            "segments": np.full(shape, -1, dtype=np.int64),
            "positions": np.zeros(shape, dtype=np.int64),
        }
        for row, pack in enumerate(ids.tolist()):
            begin = 0
            for segment, number in enumerate(self.packs[pack]):
                whole, prompt = self._text(number)
                places = slice(begin, begin + len(whole) - 1)
                found["tokens"][row, places], found["targets"][row, places] = whole[:-1], whole[1:]
                found["weight"][row, begin + max(prompt - 1, 0) : places.stop] = 1
                found["segments"][row, places] = segment
                found["positions"][row, places] = np.arange(len(whole) - 1)
                begin = places.stop
            found["positions"][row, begin:] = np.arange(self.room - begin)  # padding counts as one more text
        return found

    def _text(self, number: int) -> tuple[NDArray[np.int64], int]:
        return self.records.whole(number, number, self.records.options.completion)
