"""Flat intervals as boxes: complete, in order, without overlap, and as few as they can be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("deepspeed")

from unitrain.strategies._torch_deepspeed_state import Box, boxes_of

pytestmark = pytest.mark.fast


@given(st.data(), st.lists(st.integers(1, 5), max_size=4).map(tuple))
def test_boxes_hold_the_interval_in_flat_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    whole = np.arange(size).reshape(shape)
    boxes = boxes_of(shape, begin, end)
    corners = [zip(box.offset, box.shape, strict=True) for box in boxes]
    found = [whole[tuple(slice(at, at + count) for at, count in corner)].reshape(-1) for corner in corners]
    assert np.array_equal(np.concatenate([np.empty(0, int), *found]), np.arange(begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_whole_rows_are_one_box() -> None:
    assert boxes_of((4, 6), 6, 18) == [Box((1, 0), (2, 6))]


def test_an_interval_that_cuts_two_rows_is_three_boxes() -> None:
    assert boxes_of((4, 6), 4, 20) == [Box((0, 4), (1, 2)), Box((1, 0), (2, 6)), Box((3, 0), (1, 2))]


def test_a_scalar_is_one_box_and_nothing_is_none() -> None:
    assert boxes_of((), 0, 1) == [Box((), ())]
    assert boxes_of((3, 2), 4, 4) == []
