"""A digest says whether two tensors have equal bits, however each of them is cut into boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unitrain.digest import box_digest

pytestmark = pytest.mark.fast

DTYPES = [np.bool_, np.int8, np.uint16, np.float16, np.int32, np.float32, np.int64, np.float64]


def whole(data: NDArray) -> int:  # type: ignore[type-arg]  # any dtype
    return box_digest(data, data.shape, (0,) * data.ndim)


def summed(boxes: list[tuple[NDArray, tuple[int, ...]]], shape: tuple[int, ...]) -> int:  # type: ignore[type-arg]
    return sum(box_digest(data, shape, offset) for data, offset in boxes) % 2**64


def test_a_digest_is_the_same_on_every_machine_for_ever() -> None:
    assert whole(np.arange(6, dtype=np.float32).reshape(2, 3)) == 10435440159768027944
    assert whole(np.array(1.5)) == 9379358331952216858
    assert whole(np.zeros((0, 4), dtype=np.float32)) == 0


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 5)),
    cuts=st.tuples(st.integers(0, 7), st.integers(0, 6), st.integers(0, 5)),
    dtype=st.sampled_from(DTYPES),
)
def test_boxes_add_up_to_the_whole_however_it_is_cut(
    shape: tuple[int, ...], cuts: tuple[int, ...], dtype: type
) -> None:
    data = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    halves = [(slice(0, min(cut, size)), slice(min(cut, size), size)) for cut, size in zip(cuts, shape, strict=True)]
    boxes = [(data[a, b, c], (a.start, b.start, c.start)) for a in halves[0] for b in halves[1] for c in halves[2]]
    assert summed(boxes, shape) == whole(data)
    assert summed(boxes[::-1], shape) == whole(data)


def test_large_tensors_are_hashed_in_parts_that_add_up() -> None:
    data = np.random.default_rng(0).standard_normal((1025, 1031), dtype=np.float32)
    assert whole(data) == summed([(data[:512], (0, 0)), (data[512:], (512, 0))], data.shape)
    assert whole(data) == summed([(data[:, :7], (0, 0)), (data[:, 7:], (0, 7))], data.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_anywhere_changes_the_digest(dtype: type) -> None:
    data = np.random.default_rng(1).integers(0, 2, 33).astype(dtype)
    found = {whole(data)}
    for place in range(33):
        changed = data.copy()
        changed.view(np.uint8)[place * data.itemsize] ^= 1
        found.add(whole(changed))
    assert len(found) == 34


def test_what_compares_as_equal_but_has_other_bits_differs() -> None:
    assert whole(np.array([0.0], dtype=np.float32)) != whole(np.array([-0.0], dtype=np.float32))
    assert whole(np.array([np.nan])) == whole(np.array([np.nan]))


def test_order_and_place_count() -> None:
    data = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert len({whole(data), whole(data[::-1]), whole(data[:, ::-1]), whole(np.roll(data, 1))}) == 4
    assert box_digest(data[:2], (4, 6), (0, 0)) != box_digest(data[:2], (4, 6), (2, 0))
    assert whole(np.zeros(3)) != whole(np.zeros(4))


def test_memory_layout_does_not_count() -> None:
    data = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert whole(np.asfortranarray(data)) == whole(data)
    assert whole(data[::2]) == whole(data[::2].copy())
