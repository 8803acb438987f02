"""scikit-learn's 1797 handwritten digits, 8 by 8 pixels: a real data set that needs no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtra
from ..recipe import key, one_of
from .arrays import SPLITS, ArraySource, check_eval_fraction, split_rows


class DigitsSource(ArraySource):
    """`x`: float32 (rows, *shape) from 0 to 1; `y`: int64 (rows,) from 0 to 9."""

    num_classes = 10

    def __init__(self, images: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        super().__init__(x=images, y=labels)
        self.shape: tuple[int, ...] = images.shape[1:]  # of one sample: (1, 8, 8), or (64,) when flat


@dataclass(frozen=True, kw_only=True)
class DigitsData:
    """`data: {name: digits}`."""

    eval_fraction: float = key(0.2, "share of the images held out for evaluation; 0: none")
    flat: bool = key(False, "images as rows of 64 features instead of 1 x 8 x 8")

    def __post_init__(self) -> None:
        check_eval_fraction(self.eval_fraction)

    def open(self, split: str) -> DigitsSource | None:
        """The images of a split; None where nothing is held out. Raises MissingExtra without scikit-learn."""
        one_of("split", split, SPLITS)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingExtra("data source 'digits'", "scikit-learn", "digits") from error
        digits = load_digits()
        rows = split_rows(len(digits.target), self.eval_fraction, split)
        if not len(rows):
            return None
        shape = (64,) if self.flat else (1, 8, 8)
        images = (digits.data[rows] / 16).astype(np.float32).reshape(-1, *shape)
        return DigitsSource(images, digits.target[rows].astype(np.int64))
