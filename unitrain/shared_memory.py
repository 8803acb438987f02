"""Memory without a name, held by an agent and written by its ranks, so that it outlives any of them; and its layout.

Each rank has a region with two buffers. A buffer begins with a page: a header (magic, count, end of the tensors, length
and CRC of the index, number of checksums) and a SHA-256 for each file. The tensors follow, and the index behind them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

REGION_BYTES = 1 << 42  # of addresses for each rank: the file is sparse, and only what is written takes memory
BUFFERS = 2
BUFFER_BYTES = REGION_BYTES // BUFFERS
PAGE = max(mmap.PAGESIZE, mmap.ALLOCATIONGRANULARITY)
HEADER = struct.Struct("<8sqqqqq")
MAGIC = b"UNITRAIN"
DIGESTS_AT, DIGEST_BYTES = 128, 32
MOST_INDEX_BYTES = 256 << 20
_READ_BYTES = 1 << 20


def make_memory(ranks: int) -> int:
    """A descriptor of empty memory for these ranks."""
    fd = os.memfd_create("unitrain-snapshots", os.MFD_CLOEXEC)
    os.ftruncate(fd, ranks * REGION_BYTES)
    return fd


def place_of(region: int, buffer: int) -> int:
    """Where a buffer begins."""
    return region * REGION_BYTES + buffer * BUFFER_BYTES


@dataclass(frozen=True, kw_only=True)
class Held:
    """A finished snapshot of one rank, as it lies in a memory."""

    region: int
    buffer: int
    count: int  # odd while it is written; another one when it was written over
    size: int  # bytes from the beginning of its page
    step: int
    nonce: str
    writers: int
    files: tuple[tuple[str, int, int], ...]  # header of a file, and where its tensors begin and end
    digests: tuple[str, ...]  # SHA-256 of each file; empty while they are not there yet

    @property
    def place(self) -> int:
        """Where it begins."""
        return place_of(self.region, self.buffer)

    @property
    def complete(self) -> bool:
        """True when all checksums are there."""
        return len(self.digests) == len(self.files)


def held(fd: int, region: int, buffer: int) -> Held | None:
    """The snapshot in a buffer; None where none is finished."""
    place = place_of(region, buffer)
    page = os.pread(fd, PAGE, place)
    if len(page) < HEADER.size:
        return None
    magic, count, stop, length, crc, num_digests = HEADER.unpack_from(page)
    if magic != MAGIC or count % 2 or not 0 < length <= MOST_INDEX_BYTES or not 0 <= stop < BUFFER_BYTES:
        return None
    text = os.pread(fd, length, place + PAGE + stop)
    if zlib.crc32(text) != crc:
        return None
    index: dict[str, Any] = json.loads(text)
    digests = (page[DIGESTS_AT + DIGEST_BYTES * number :][:DIGEST_BYTES].hex() for number in range(num_digests))
    return Held(
        region=region,
        buffer=buffer,
        count=count,
        size=PAGE + stop + length,
        step=index["step"],
        nonce=index["nonce"],
        writers=index["writers"],
        files=tuple((header, begin, end) for _, header, begin, end in index["files"]),
        digests=tuple(digests),
    )


def sound(fd: int, found: Held) -> bool:
    """True when its bytes are those that its rank has written."""
    return found.complete and [digest.hex() for digest in _digests(fd, found)] == list(found.digests)


def add_digests(fd: int, found: Held) -> None:
    """The checksums of a finished snapshot whose rank has ended before it came to them."""
    digests = b"".join(_digests(fd, found))
    os.pwrite(fd, digests, found.place + DIGESTS_AT)
    page = os.pread(fd, HEADER.size, found.place)
    os.pwrite(fd, HEADER.pack(*HEADER.unpack(page)[:-1], len(found.files)), found.place)


def _digests(fd: int, found: Held) -> Iterator[bytes]:
    for header, begin, end in found.files:
        seen = hashlib.sha256(header.encode("latin-1"))
        place, stop = found.place + PAGE + begin, found.place + PAGE + end
        while place < stop:
            piece = os.pread(fd, min(_READ_BYTES, stop - place), place)
            seen.update(piece)
            place += len(piece)
        yield seen.digest()
