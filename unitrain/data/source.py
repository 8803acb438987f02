"""The contract of a data source, and map-style datasets behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError


class Source(ABC):
    """`fetch(ids)` gives the samples with those ids; the order of ids belongs to the cursor."""

    tokens_per_sample: int = 0  # for the clock and tokens/s; 0 where samples are not made of tokens

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples; ids are 0 to len - 1."""

    @abstractmethod
    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Named arrays, row i of each belonging to ids[i]. Called from a background thread."""

    def fingerprint(self) -> str:
        """Changes when the data does; a run refuses to resume on other data. Cheap: names and sizes, not contents."""
        return f"{type(self).__name__}:{len(self)}"

    def __repr__(self) -> str:
        return type(self).__name__


class DatasetSource(Source):
    """Any map-style dataset (`__len__` and `__getitem__`, such as torch's) as a source.

    `collate` takes a list of samples and returns named arrays, rows first. Without it mappings are stacked key by
    key, and tuples by place, under `names`. Tensors become numpy arrays. Raises DataError, naming the sample, where
    one cannot be read or stacked.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        *,
        names: Sequence[str] = ("x", "y"),
        tokens_per_sample: int = 0,
    ) -> None:
        for method in ("__len__", "__getitem__"):
            if not hasattr(dataset, method):
                raise DataError(
                    f"{type(dataset).__name__} has no {method}; give a map-style dataset with a length, "
                    "or write a Source of your own"
                )
        self.dataset = dataset
        self.tokens_per_sample = tokens_per_sample
        self._collate = collate
        self._names = tuple(names)

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """The samples with those ids, stacked."""
        numbers = ids.tolist()
        samples = [self._sample(number) for number in numbers]
        if self._collate is None:
            return self._stack(numbers, samples)
        collated = self._collate(samples)
        if not isinstance(collated, Mapping):
            raise DataError(f"collate returned a {type(collated).__name__}; it must return a mapping of named arrays")
        return {name: as_array(value) for name, value in collated.items()}

    def fingerprint(self) -> str:
        """Class and length of the dataset."""
        return f"{self!r}:{len(self)}"

    def __repr__(self) -> str:
        return f"DatasetSource({type(self.dataset).__name__})"

    def _sample(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except Exception as error:
            raise unreadable(self, number, error) from error

    def _stack(self, numbers: Sequence[int], samples: Sequence[Any]) -> dict[str, NDArray[Any]]:
        rows = [self._named(number, sample) for number, sample in zip(numbers, samples, strict=True)]
        first = rows[0]
        for number, row in zip(numbers, rows, strict=True):
            if row.keys() != first.keys():
                raise DataError(
                    f"sample {number} has {', '.join(row)}, but sample {numbers[0]} has {', '.join(first)}; "
                    "pass collate= to join them"
                )
            for name, array in row.items():
                if array.shape != first[name].shape:
                    raise DataError(
                        f"sample {number} has {name!r} of shape {array.shape}, but sample {numbers[0]} of shape "
                        f"{first[name].shape}; pass collate= to pad or crop them"
                    )
        return {name: np.stack([row[name] for row in rows]) for name in first}

    def _named(self, number: int, sample: Any) -> dict[str, NDArray[Any]]:
        if isinstance(sample, Mapping):
            named = dict(sample)
        else:
            parts = sample if isinstance(sample, tuple | list) else (sample,)
            if len(parts) > len(self._names):
                raise DataError(
                    f"sample {number} has {len(parts)} parts, but names are given for {len(self._names)}; "
                    "pass names=(...) with one for each part"
                )
            named = dict(zip(self._names, parts, strict=False))
        arrays = {}
        for name, value in named.items():
            try:
                array = as_array(value)
            except (TypeError, ValueError) as error:
                raise _not_numbers(number, name, value) from error
            if array.dtype.kind not in "biufc":
                raise _not_numbers(number, name, value)
            arrays[name] = array
        return arrays


def as_array(value: Any) -> NDArray[Any]:
    """A tensor of any framework, or anything that numpy understands, as an array."""
    numpy = getattr(value, "numpy", None)
    return np.asarray(numpy() if callable(numpy) else value)


def unreadable(source: Source, number: int, error: Exception) -> DataError:
    """The error for one sample that a source could not give."""
    return DataError(f"sample {number} of {source!r} could not be read: {type(error).__name__}: {error}")


def _not_numbers(number: int, name: str, value: Any) -> DataError:
    return DataError(
        f"sample {number} has {name!r} of type {type(value).__name__}, which is no array of numbers; "
        "pass collate= to turn samples into arrays"
    )
