"""Which canonical tensor is this variable, and how are its axes turned? Declared beside a model, in each framework.

A canonical tensor has the name and the axes of the torch twin. A framework's own tensor becomes it by a
permutation of axes and by joining neighbours: what a box of one is in the other can be said without the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

Index = tuple[slice, ...]


class Piece(NamedTuple):
    """Part of a native box that is one box of the canonical tensor."""

    offset: tuple[int, ...]  # of the canonical box in the canonical tensor
    shape: tuple[int, ...]  # of the canonical box
    within: Index  # the part of the native box


@dataclass(frozen=True)
class Turn:
    """Canonical = native.transpose(axes), then each group of `joined` consecutive axes becomes one.

    `axes` None: as they are; `joined` None: no axes are joined. Invertible, given the native shape.
    """

    axes: tuple[int, ...] | None = None
    joined: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.axes is not None and sorted(self.axes) != list(range(len(self.axes))):
            raise UserError(f"a layout turns axes {self.axes}; name each of the {len(self.axes)} once, from 0")
        if self.joined is not None and min(self.joined, default=1) < 1:
            raise UserError(f"a layout joins axes in groups of {self.joined}; each group has at least one")
        if self.axes is not None and self.joined is not None:
            self._groups(len(self.axes))

    def canonical_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The canonical shape of a native one."""
        turned = self._turned(shape)
        return tuple(math.prod(turned[begin:end]) for begin, end in self._groups(len(turned)))

    def to_canonical(self, array: NDArray[Any]) -> NDArray[Any]:
        """A whole native tensor as the canonical one, C-contiguous."""
        shape = self.canonical_shape(array.shape)
        return np.ascontiguousarray(array if self.axes is None else array.transpose(self.axes)).reshape(shape)

    def to_native(self, array: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """A whole canonical tensor as the native one of that shape, C-contiguous."""
        if array.shape != (expected := self.canonical_shape(shape)):
            raise UserError(
                f"a canonical tensor of shape {array.shape} cannot become one of shape {tuple(shape)}, which its "
                f"layout makes {expected}"
            )
        turned = array.reshape(self._turned(shape))
        turned = turned if self.axes is None else turned.transpose(np.argsort(self.axes))
        return np.ascontiguousarray(turned).reshape(shape)  # numpy makes a scalar a vector of one

    def pieces(self, whole: Sequence[int], offset: Sequence[int], shape: Sequence[int]) -> Iterator[Piece]:
        """The canonical boxes that a box of a native tensor of shape `whole` consists of, in any order."""
        self._turned(whole)  # raises
        axes = tuple(range(len(whole))) if self.axes is None else self.axes
        size, begin, count = (tuple(values[axis] for axis in axes) for values in (whole, offset, shape))
        if not math.prod(shape):
            return
        groups = [
            list(_runs(size[first:last], begin[first:last], count[first:last]))
            for first, last in self._groups(len(axes))
        ]
        for chosen in itertools.product(*groups):
            turned = [part for run in chosen for part in run.within]
            within = [slice(None)] * len(axes)
            for axis, part in zip(axes, turned, strict=True):
                within[axis] = part
            yield Piece(tuple(run.begin for run in chosen), tuple(run.size for run in chosen), tuple(within))

    def piece_to_canonical(self, box: NDArray[Any], piece: Piece) -> NDArray[Any]:
        """The data of a piece of a native box, in canonical shape, C-contiguous."""
        return np.ascontiguousarray(self._view(box, piece)).reshape(piece.shape)

    def put_piece(self, box: NDArray[Any], piece: Piece, data: NDArray[Any]) -> None:
        """Write canonical data where the piece lies in a native box."""
        turned = self._view(box, piece)
        turned[...] = data.reshape(turned.shape)

    def _view(self, box: NDArray[Any], piece: Piece) -> NDArray[Any]:
        within: tuple[slice | EllipsisType, ...] = (*piece.within, ...)  # the dots keep a scalar an array
        part = box[within]
        return part if self.axes is None else part.transpose(self.axes)

    def _turned(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self.axes is not None and len(self.axes) != len(shape):
            raise UserError(f"a layout turns {len(self.axes)} axes, {self.axes}, but the tensor has {len(shape)}")
        return tuple(shape) if self.axes is None else tuple(shape[axis] for axis in self.axes)

    def _groups(self, ndim: int) -> list[tuple[int, int]]:
        sizes = (1,) * ndim if self.joined is None else self.joined
        if sum(sizes) != ndim:
            raise UserError(f"a layout joins {sum(sizes)} axes in groups of {sizes}, but the tensor has {ndim}")
        ends = list(itertools.accumulate(sizes))
        return list(zip([0, *ends[:-1]], ends, strict=True)) if sizes else []


class _Run(NamedTuple):
    """Consecutive places of a joined axis, and where they are in the box of the axes that were joined."""

    begin: int
    size: int
    within: Index


def _runs(whole: Sequence[int], offset: Sequence[int], shape: Sequence[int]) -> Iterator[_Run]:
    """The intervals of the joined axis that a box of the axes covers, as long as they can be."""
    inner = len(whole) - 1
    while inner > 0 and shape[inner] == whole[inner]:
        inner -= 1  # axes behind `inner` are whole, so that steps of `inner` follow one another
    after = math.prod(whole[inner + 1 :])
    strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
    for outer in itertools.product(*(range(count) for count in shape[:inner])):
        begin = sum((offset[axis] + place) * strides[axis] for axis, place in enumerate(outer))
        within = (*(slice(place, place + 1) for place in outer), *(slice(None) for _ in whole[inner:]))
        yield _Run(begin + offset[inner] * after, shape[inner] * after, within)


SAME = Turn()
TRANSPOSED = Turn((1, 0))  # (inputs, outputs) to (outputs, inputs)
CONV2D = Turn((3, 2, 0, 1))  # (height, width, inputs, outputs) to (outputs, inputs, height, width)


class Named(NamedTuple):
    """A variable's canonical name, and how its axes become the canonical ones."""

    name: str
    turn: Turn


class Rule(NamedTuple):
    r"""Native paths that a regular expression matches whole, and their canonical name (`\1` as in re.sub)."""

    path: str
    name: str
    turn: Turn = SAME


class Layout:
    """The rules of one model in one framework; the first that matches counts. Raises UserError for a wrong one."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = tuple(Rule(*rule) for rule in rules)
        for rule in self.rules:
            with _blamed(rule):
                re.compile(rule.path)

    def of(self, path: str) -> Named:
        """What the variable at that path is. Raises UserError where no rule knows it."""
        for rule in self.rules:
            if found := re.fullmatch(rule.path, path):
                with _blamed(rule):
                    return Named(found.expand(rule.name), rule.turn)
        raise UserError(f"the model's layout has no rule for {path!r}; add one that gives its canonical name")


class Plain(Layout):
    """Names and axes as the framework has them: of models that have no twin."""

    def of(self, path: str) -> Named:
        """See Layout."""
        return Named(path, SAME)


@contextlib.contextmanager
def _blamed(rule: Rule) -> Iterator[None]:
    try:
        yield
    except (re.error, IndexError) as error:
        raise UserError(f"the layout's rule {rule.path!r} -> {rule.name!r} is wrong: {error}") from error
