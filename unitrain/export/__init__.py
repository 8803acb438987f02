"""Export: a folder that others load, from a checkpoint that any strategy wrote."""

from __future__ import annotations

from .run import Summary, export

__all__ = ["Summary", "export"]
