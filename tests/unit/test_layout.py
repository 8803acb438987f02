"""Layouts: a native tensor, whole or in any boxes, is its canonical one; nothing is lost, doubled or mistaken."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unitrain.errors import UserError
from unitrain.models.layout import CONV2D, SAME, TRANSPOSED, Layout, Named, Plain, Rule, Turn

pytestmark = pytest.mark.fast

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape


def numbered(shape: Sequence[int]) -> NDArray[np.int64]:
    return np.arange(math.prod(shape)).reshape(shape)


def turns(ndim: int) -> Iterator[Turn]:
    """Every one there is: each permutation, each way to join neighbours."""
    for axes in (None, *itertools.permutations(range(ndim))):
        yield Turn(axes)
        for cuts in itertools.product([False, True], repeat=max(ndim - 1, 0)):
            ends = [axis + 1 for axis, cut in enumerate(cuts) if cut] + [ndim] * (ndim > 0)
            yield Turn(axes, tuple(end - begin for begin, end in itertools.pairwise([0, *ends])))


def grids(shape: Sequence[int]) -> Iterator[list[Box]]:
    """Partitions into boxes: every way to cut each axis into intervals, empty ones among them."""
    cuts = [[(), *((place,) for place in range(size + 1)), tuple(range(1, size))] for size in shape]
    for chosen in itertools.product(*cuts):
        intervals = [list(itertools.pairwise([0, *places, size])) for places, size in zip(chosen, shape, strict=True)]
        yield [
            (tuple(begin for begin, _ in box), tuple(end - begin for begin, end in box))
            for box in itertools.product(*intervals)
        ]


def check_boxes(turn: Turn, shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Taken apart into boxes and put together in pieces, and back, a tensor is what it was."""
    native = numbered(shape)
    canonical = turn.to_canonical(native)
    seen = np.zeros(canonical.shape, dtype=int)
    for offset, size in boxes:
        box = native[tuple(slice(begin, begin + count) for begin, count in zip(offset, size, strict=True))]
        back = np.full(size, -1)
        for piece in turn.pieces(shape, offset, size):
            assert math.prod(piece.shape) > 0
            where = tuple(slice(begin, begin + count) for begin, count in zip(piece.offset, piece.shape, strict=True))
            data = turn.piece_to_canonical(box, piece)
            assert data.flags.c_contiguous
            np.testing.assert_array_equal(data, canonical[where], strict=True)
            seen[where] += 1
            turn.put_piece(back, piece, canonical[where])
        np.testing.assert_array_equal(back, box, strict=True)
    assert (seen == 1).all()


SHAPES: dict[int, list[tuple[int, ...]]] = {
    0: [()],
    1: [(3,), (0,)],
    2: [(2, 3), (3, 1), (0, 2)],
    3: [(2, 2, 2), (3, 1, 2)],
}


@pytest.mark.parametrize("ndim", SHAPES)
def test_every_turn_of_small_tensors_keeps_every_element_in_every_partition(ndim: int) -> None:
    for turn, shape in itertools.product(turns(ndim), SHAPES[ndim]):
        for boxes in grids(shape):
            check_boxes(turn, shape, boxes)


def test_every_turn_of_four_axes_is_what_numpy_makes_of_it() -> None:
    shape = (2, 3, 1, 4)
    native = numbered(shape)
    for turn in turns(4):
        axes = turn.axes or (0, 1, 2, 3)
        turned = native.transpose(axes)
        ends = list(itertools.accumulate(turn.joined or (1, 1, 1, 1)))
        expected = turned.reshape([math.prod(turned.shape[a:b]) for a, b in itertools.pairwise([0, *ends])])
        found = turn.to_canonical(native)
        assert found.shape == turn.canonical_shape(shape)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected, strict=True)
        back = turn.to_native(found, shape)
        assert back.flags.c_contiguous
        np.testing.assert_array_equal(back, native, strict=True)


class Case(NamedTuple):
    turn: Turn
    shape: tuple[int, ...]
    boxes: list[Box]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to five axes, cut again and again at any place, and not in a grid."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=5)))
    axes = draw(st.none() | st.permutations(range(len(shape))).map(tuple))
    cuts = draw(st.lists(st.booleans(), min_size=max(len(shape) - 1, 0), max_size=max(len(shape) - 1, 0)))
    ends = [axis + 1 for axis, cut in enumerate(cuts) if cut] + [len(shape)] * bool(shape)
    joined = tuple(end - begin for begin, end in itertools.pairwise([0, *ends]))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        place = draw(st.integers(0, size[axis]))
        for begin, count in ((0, place), (place, size[axis] - place)):
            moved = tuple(o + begin * (a == axis) for a, o in enumerate(offset))
            boxes.append((moved, tuple(count if a == axis else s for a, s in enumerate(size))))
    return Case(Turn(axes, draw(st.sampled_from([joined, None]))), shape, boxes)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_any_turn_of_any_tensor_keeps_every_element_in_any_partition(case: Case) -> None:
    check_boxes(*case)
    native = numbered(case.shape)
    np.testing.assert_array_equal(case.turn.to_native(case.turn.to_canonical(native), case.shape), native, strict=True)


def test_bits_of_every_width_are_moved_as_they_are() -> None:
    for dtype in (np.bool_, np.uint16, np.float32, np.int64):
        native = np.arange(6).reshape(2, 3).astype(dtype)
        assert TRANSPOSED.to_canonical(native).dtype == dtype
        assert TRANSPOSED.to_native(native.T, (2, 3)).dtype == dtype
    nan = np.array([[np.uint32(0x7FC01234)]]).view(np.float32)
    assert TRANSPOSED.to_canonical(nan).view(np.uint32) == 0x7FC01234


def test_a_kernel_is_torch_s_matrix_and_an_image_kernel_torch_s() -> None:
    assert TRANSPOSED.canonical_shape((5, 7)) == (7, 5)
    assert CONV2D.canonical_shape((3, 4, 5, 6)) == (6, 5, 3, 4)
    kernel = numbered((3, 4, 5, 6))
    assert CONV2D.to_canonical(kernel)[1, 2, 0, 3] == kernel[0, 3, 2, 1]


QKV = Turn((1, 2, 3, 0), (3, 1))  # (inputs, 3, heads, features) to (outputs, inputs)


def test_pieces_are_as_few_as_whole_axes_allow() -> None:
    whole = (8, 3, 4, 2)

    def pieces(offset: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [piece[:2] for piece in QKV.pieces(whole, offset, shape)]

    # whole, and cut by inputs: one box; cut by heads: one for queries, keys and values each
    assert pieces((0, 0, 0, 0), whole) == [((0, 0), (24, 8))]
    assert pieces((4, 0, 0, 0), (4, 3, 4, 2)) == [((0, 4), (24, 4))]
    assert pieces((0, 0, 2, 0), (8, 3, 2, 2)) == [((4, 0), (4, 8)), ((12, 0), (4, 8)), ((20, 0), (4, 8))]
    assert pieces((0, 0, 2, 0), (8, 0, 2, 2)) == []


def test_a_fused_kernel_is_one_matrix_of_queries_then_keys_then_values() -> None:
    kernel = np.random.default_rng(0).standard_normal((8, 3, 4, 2))
    x = np.random.default_rng(1).standard_normal(8)
    np.testing.assert_allclose(QKV.to_canonical(kernel) @ x, np.einsum("i,iphf->phf", x, kernel).ravel())


def test_a_tensor_that_does_not_fit_its_layout_is_refused() -> None:
    with pytest.raises(UserError, match=r"turns 2 axes, \(1, 0\), but the tensor has 3"):
        TRANSPOSED.canonical_shape((1, 2, 3))
    with pytest.raises(UserError, match=r"turns 2 axes, \(1, 0\), but the tensor has 1"):
        TRANSPOSED.to_canonical(np.zeros(3))
    with pytest.raises(UserError, match="turns 2 axes"):
        list(TRANSPOSED.pieces((4,), (0,), (4,)))
    with pytest.raises(UserError, match=r"joins 3 axes in groups of \(2, 1\), but the tensor has 2"):
        Turn(joined=(2, 1)).canonical_shape((4, 4))
    # As many numbers, but in other places: a reshape would say nothing.
    with pytest.raises(UserError, match=r"shape \(2, 3\) cannot become one of shape \(2, 3\), .* makes \(3, 2\)"):
        TRANSPOSED.to_native(np.zeros((2, 3)), (2, 3))


@pytest.mark.parametrize(
    ("axes", "joined", "words"),
    [
        ((0, 2), None, "turns axes (0, 2); name each of the 2 once, from 0"),
        ((1, 1), None, "turns axes (1, 1)"),
        ((0, -1), None, "turns axes (0, -1)"),
        (None, (2, 0), "groups of (2, 0); each group has at least one"),
        ((1, 0), (2, 1), "joins 3 axes in groups of (2, 1), but the tensor has 2"),
    ],
)
def test_an_impossible_turn_is_refused_where_it_is_written(
    axes: tuple[int, ...] | None, joined: tuple[int, ...] | None, words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        Turn(axes, joined)


def test_the_first_rule_that_matches_the_whole_path_counts() -> None:
    layout = Layout(
        Rule(r"blocks\.(\d+)\.kernel", r"layers.\1.weight", TRANSPOSED),
        Rule(r"(.*)\.bias", r"\1.bias"),
        Rule(r".*", "never"),
    )
    assert layout.of("blocks.3.kernel") == Named("layers.3.weight", TRANSPOSED)
    assert layout.of("blocks.3.bias") == Named("blocks.3.bias", SAME)
    assert layout.of("more.blocks.3.kernel") == Named("never", SAME)
    assert Plain().of("any/path.at:all") == Named("any/path.at:all", SAME)


def test_wrong_rules_are_told_by_the_rule() -> None:
    with pytest.raises(UserError, match=r"no rule for 'head\.kernels'; add one that gives its canonical name"):
        Layout(Rule(r"head\.kernel", "head.weight")).of("head.kernels")
    with pytest.raises(UserError, match=r"rule '\(head' -> 'head' is wrong: missing \)"):
        Layout(Rule("(head", "head"))
    with pytest.raises(UserError, match=r"rule 'head' -> '.*' is wrong: invalid group reference 1"):
        Layout(Rule("head", r"\1.weight")).of("head")
