"""The contract of a data source, and map-style datasets behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
