"""Memory without a name, held by an agent and written by its ranks, so that it outlives any of them."""

from __future__ import annotations

import os

REGION_BYTES = 1 << 42  # of addresses for each rank: the file is sparse, and only what is written takes memory


def make_memory(ranks: int) -> int:
    """A descriptor of empty memory for these ranks."""
    fd = os.memfd_create("unitrain-snapshots", os.MFD_CLOEXEC)
    os.ftruncate(fd, ranks * REGION_BYTES)
    return fd
