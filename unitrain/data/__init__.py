"""Where samples come from: a Source fetches named arrays by id, and knows nothing of ranks or order."""

from __future__ import annotations

from .arrays import ArraySource
from .source import DatasetSource, Source

__all__ = ["ArraySource", "DatasetSource", "Source"]
