"""Windows of a long row of tokens, as a language model reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def num_windows(num_tokens: int, seq_len: int) -> int:
    """How many windows fit; each takes seq_len tokens and looks at one more, which begins the next."""
    return max(num_tokens - 1, 0) // seq_len


def windows(tokens: NDArray[Any], starts: NDArray[np.int64], seq_len: int) -> dict[str, NDArray[np.int64]]:
    """The windows that begin at `starts`: `tokens` and `targets`, int64 (rows, seq_len)."""
    return next_token(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))


def next_token(window: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """`tokens`, and `targets` that are one token later, of rows of seq_len + 1 tokens."""
    return {"tokens": np.ascontiguousarray(window[:, :-1]), "targets": np.ascontiguousarray(window[:, 1:])}
