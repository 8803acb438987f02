"""Host memory that a save copies into: allocated by the first save, used again by all later ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLAB_BYTES = 64 << 20


class Arena:
    """A run of bytes over equal slabs; what is put in lies without gaps."""

    def __init__(self, slab_bytes: int = SLAB_BYTES) -> None:
        self.used = 0  # bytes
        self._slab_bytes = slab_bytes
        self._slabs: list[NDArray[np.uint8]] = []

    def clear(self) -> None:
        """Forget what is in it and keep the memory."""
        self.used = 0

    def put(self, data: NDArray[Any]) -> None:
        """Copy an array's elements to the end, in C order."""
        rest = data.reshape(-1).view(np.uint8)
        while len(rest):
            number, place = divmod(self.used, self._slab_bytes)
            if number == len(self._slabs):
                self._slabs.append(np.empty(self._slab_bytes, dtype=np.uint8))
            count = min(len(rest), self._slab_bytes - place)
            self._slabs[number][place : place + count] = rest[:count]
            rest = rest[count:]
            self.used += count

    def chunks(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes from start to stop, as views of the slabs."""
        while start < stop:
            number, place = divmod(start, self._slab_bytes)
            count = min(stop - start, self._slab_bytes - place)
            yield self._slabs[number][place : place + count].data
            start += count
