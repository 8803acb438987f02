"""Checkpoints: named logical tensors and a manifest, saved in the background and read by any strategy.

A checkpoint exists if and only if its manifest is valid. Saver writes, open_newest finds, CheckpointReader reads.
"""

from __future__ import annotations

from .catalog import Catalog, Found, Newest, PassedOver, list_checkpoints, newest, open_newest
from .fence import take_over
from .lease import Holder, Lease, take_lease
from .reader import CheckpointReader
from .saver import Saver, SaveReport

__all__ = [
    "Catalog",
    "CheckpointReader",
    "Found",
    "Holder",
    "Lease",
    "Newest",
    "PassedOver",
    "SaveReport",
    "Saver",
    "list_checkpoints",
    "newest",
    "open_newest",
    "take_lease",
    "take_over",
]
