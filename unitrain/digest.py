"""A hash of a tensor that does not depend on how it is cut into boxes.

Each element contributes a scrambled mix of its bits and its place in the whole tensor; contributions add up
modulo 2**64. So ranks hash their own boxes and add the results, in any order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .cursor import scramble

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_CHUNK = 1 << 20  # elements hashed at a time: bounds the scratch memory


def box_digest(data: NDArray, shape: tuple[int, ...], offset: tuple[int, ...]) -> int:  # type: ignore[type-arg]  # any dtype
    """The contribution of one box at `offset` of a tensor of `shape`; 0 to 2**64 - 1.

    `data` has an item size of 1, 2, 4 or 8 bytes. Two tensors with equal bits have equal sums over their boxes.
    """
    if data.size == 0:
        return 0
    bits = np.ascontiguousarray(data).view(_UNSIGNED[data.dtype.itemsize]).reshape(-1)
    total = np.uint64(0)
    for begin in range(0, bits.size, _CHUNK):
        places = _places(begin, min(begin + _CHUNK, bits.size), data.shape, shape, offset)
        values = bits[begin : begin + _CHUNK].astype(np.uint64)
        with np.errstate(over="ignore"):
            mixed = scramble(values + scramble(places + np.uint64(0x9E3779B97F4A7C15)))
            total = total + mixed.sum(dtype=np.uint64)
    return int(total)


def _places(
    begin: int, end: int, box: tuple[int, ...], shape: tuple[int, ...], offset: tuple[int, ...]
) -> NDArray[np.uint64]:
    """Flat indices in the whole tensor of elements begin..end of the box."""
    flat = np.arange(begin, end, dtype=np.int64)
    if not box:
        return flat.astype(np.uint64)
    indices = np.unravel_index(flat, box)
    shifted = tuple(index + start for index, start in zip(indices, offset, strict=True))
    return np.ravel_multi_index(shifted, shape).astype(np.uint64)
