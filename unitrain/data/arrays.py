"""Samples that are rows of named arrays in memory, or of an .npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cursor import permute
from ..errors import DataError, RecipeError
from ..recipe import key, one_of, required
from .source import Source, as_array

SPLITS = ("train", "eval")
_SPLIT_KEY = 0x5EED  # which rows are held out depends on their number alone, never on a run's seed


class ArraySource(Source):
    """Named arrays or tensors of equal length; row i of each is sample i."""

    def __init__(self, /, **arrays: ArrayLike) -> None:
        if not arrays:
            raise DataError("ArraySource was given no arrays; name at least one, such as ArraySource(x=..., y=...)")
        self._arrays = {name: as_array(array) for name, array in arrays.items()}
        shapes = {name: array.shape for name, array in self._arrays.items()}
        if any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
            raise DataError(f"arrays need one row per sample, as many in each; found {_listed(shapes)}")

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Copies of those rows."""
        return {name: array[ids] for name, array in self._arrays.items()}

    def fingerprint(self) -> str:
        """Names, types and shapes of the arrays."""
        parts = (f"{name}:{array.dtype}{list(array.shape)}" for name, array in sorted(self._arrays.items()))
        return f"{type(self).__name__}:{','.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class ArraysData:
    """`data: {name: arrays}`: an .npz file; each array in it has one row per sample."""

    path: str = required("an .npz file of named arrays with one row per sample, as numpy.savez writes it")
    eval_path: str | None = key(None, "an .npz file for evaluation; null: rows of `path` are held out")
    eval_fraction: float = key(0.1, "share of the rows of `path` held out for evaluation; 0: none")

    def __post_init__(self) -> None:
        check_eval_fraction(self.eval_fraction)

    def open(self, split: str) -> ArraySource | None:
        """The rows of a split; None where nothing is held out."""
        one_of("split", split, SPLITS)
        if self.eval_path is not None and split == "eval":
            return ArraySource(**_read("data.eval_path", self.eval_path))
        arrays = _read("data.path", self.path)
        if self.eval_path is not None:
            return ArraySource(**arrays)
        whole = ArraySource(**arrays)
        rows = split_rows(len(whole), self.eval_fraction, split)
        return ArraySource(**{name: array[rows] for name, array in arrays.items()}) if len(rows) else None


def split_rows(num_rows: int, eval_fraction: float, split: str) -> NDArray[np.int64]:
    """The rows of a split in their own order, chosen evenly: files are often sorted by class.

    Each side has at least one row where eval_fraction is above 0. Raises RecipeError where that is impossible.
    """
    if not eval_fraction:
        return np.arange(num_rows if split == "train" else 0)
    if num_rows < 2:
        raise RecipeError(f"{num_rows} rows cannot be split into train and eval; set data.eval_fraction: 0")
    num_eval = min(max(round(num_rows * eval_fraction), 1), num_rows - 1)
    shuffled = permute(np.arange(num_rows), num_rows, _SPLIT_KEY)
    return np.sort(shuffled[:num_eval] if split == "eval" else shuffled[num_eval:])


def check_eval_fraction(fraction: float) -> None:
    """Raise RecipeError unless something is left to train on."""
    if not 0 <= fraction < 1:
        raise RecipeError(f"data.eval_fraction is {fraction}; it must be at least 0 and below 1")


def _read(where: str, path: str) -> dict[str, NDArray[Any]]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise RecipeError(f"{where} is {path!r}, where there is no file; write one with numpy.savez")
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DataError(f"{path} holds one array without a name; save named arrays with numpy.savez")
        with loaded:
            return dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} could not be read as an .npz file of plain arrays: {error}") from error


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
