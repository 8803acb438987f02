"""Snapshots in memory that outlives its writer: a killed rank loses the steps since the last one, and no more.

The memory is a file without a name that the agent holds, with a region for each rank and two buffers in it. A buffer's
header counts up before and after each change: an odd count is a snapshot that its writer did not finish. Read together
the regions are a checkpoint like any other, whose manifest is made of the ranks' part tables and proved the same way.

    buffer: a page (magic, count, place and size and CRC of the index, SHA-256 of each file) | tensors | index (JSON)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import mmap
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointDamaged, CheckpointError
from ..shared_memory import (
    BUFFER_BYTES,
    BUFFERS,
    DIGEST_BYTES,
    DIGESTS_AT,
    HEADER,
    MAGIC,
    MOST_INDEX_BYTES,
    PAGE,
    REGION_BYTES,
    place_of,
)
from ..strategy import Shard
from .arena import Arena
from .container import header_bytes
from .files import FileRecord, Folder
from .manifest import MANIFEST, STATE, Box, Manifest, Part, Tensor
from .saver import copied, grouped, state_bytes

_FILE_BYTES = 1 << 62  # one file for each rank


class Snapshots:
    """One rank's own region, into which it copies what it has learned."""

    def __init__(self, fd: int, *, writer: int, writers: int, nonce: str) -> None:
        self._writer, self._writers, self._nonce = writer, writers, nonce
        self._buffers = [_Buffer(fd, place_of(writer, number)) for number in range(BUFFERS)]
        self._known: dict[Any, Tensor] = {}
        self._hashing: threading.Thread | None = None
        # What the run may go on from is the last to be written over: this rank's newest may be no other rank's.
        spared = {(whole.step, whole.nonce) for whole in whole_snapshots(fd)[:1]}
        held = _read(self._buffers[0])
        self._next = 1 if held is not None and (held.step, held.nonce) in spared else 0

    def save(self, step: int, shards: Mapping[str, Iterable[Shard]], state: Mapping[str, Any]) -> None:
        """Copy this rank's shards over the older of its two snapshots; only their checksums come later.

        Every rank must call it for the same steps. Raises CheckpointError for shards that no checkpoint can hold, and
        where there is no memory.
        """
        self._join()
        buffer, self._next = self._buffers[self._next], 1 - self._next
        try:
            with buffer.changing():
                files = self._write(buffer, step, shards, state_bytes(state))
        except OSError as error:
            raise CheckpointError(f"no memory for the snapshot of step {step}: {error.strerror}") from error
        self._hashing = threading.Thread(target=buffer.add_digests, args=(files,), name="snapshot", daemon=True)
        self._hashing.start()

    def forget(self) -> None:
        """No snapshot of this rank counts any more."""
        self._join()
        for buffer in self._buffers:
            buffer.forget()

    def close(self) -> None:
        """End the checksum under way; the snapshots stay."""
        self._join()

    def _join(self) -> None:
        if self._hashing is not None:
            self._hashing.join()
            self._hashing = None

    def _write(self, buffer: _Buffer, step: int, shards: Mapping[str, Iterable[Shard]], state: bytes) -> list[_File]:
        arena = _Mapped(buffer)
        items = copied(arena, shards, self._known)
        tensors = {item.tensor.identity: item.tensor for item in items}
        boxes: dict[tuple[str, str, str], list[Box]] = {}
        files: list[_File] = []
        for number, group in enumerate(grouped(items, _FILE_BYTES)):
            name = f"part-{self._writer}-{number}.safetensors"
            keys = [f"t{place:06d}" for place in range(len(group))]
            header = header_bytes([(key, item.tensor.dtype, item.shape) for key, item in zip(keys, group, strict=True)])
            files.append(_File(name, header, group[0].start, group[-1].stop))
            for key, item in zip(keys, group, strict=True):
                boxes.setdefault(item.tensor.identity, []).append(Box(name, key, item.offset, item.shape))
        part = Part(
            step=step,
            writer=self._writer,
            writers=self._writers,
            files={},
            tensors=tuple(replace(tensor, boxes=tuple(boxes.get(key, ()))) for key, tensor in tensors.items()),
        )
        facts = {"nonce": self._nonce, "step": step, "writer": self._writer, "writers": self._writers}
        listed = [[file.name, file.header.decode("latin-1"), file.start, file.stop] for file in files]
        index = {**facts, "files": listed, "part": part.to_bytes().decode(), "state": state.decode()}
        buffer.finish(json.dumps(index).encode(), arena.used)
        return files


class _File(NamedTuple):
    """A container that is nowhere in one piece."""

    name: str
    header: bytes
    start: int  # of what follows, among the tensors
    stop: int


class Snapshot(NamedTuple):
    """What one rank holds of one step."""

    nonce: str
    step: int
    writer: int
    writers: int
    buffer: _Buffer


@dataclass(frozen=True)
class Whole:
    """A snapshot that every rank of its attempt has finished."""

    nonce: str
    step: int
    of_ranks: tuple[Snapshot, ...]

    @property
    def name(self) -> str:
        """By which all ranks mean the same one."""
        return f"memory:{self.step}:{self.nonce}"


def whole_snapshots(fd: int) -> list[Whole]:
    """All snapshots of which every rank's part is finished, newest first."""
    found: dict[tuple[int, str], dict[int, Snapshot]] = {}
    for region in range(os.fstat(fd).st_size // REGION_BYTES):
        for number in range(BUFFERS):
            snapshot = _read(_Buffer(fd, place_of(region, number)))
            if snapshot is not None and snapshot.writer == region:
                found.setdefault((snapshot.step, snapshot.nonce), {})[snapshot.writer] = snapshot
    wholes = []
    for (step, nonce), parts in sorted(found.items(), reverse=True):
        writers = next(iter(parts.values())).writers
        if set(parts) == set(range(writers)) and all(part.writers == writers for part in parts.values()):
            wholes.append(Whole(nonce, step, tuple(parts[writer] for writer in range(writers))))
    return wholes


class MemoryFolder(Folder):
    """A whole snapshot as the folder of a checkpoint: CheckpointReader reads it as it reads any other."""

    def __init__(self, whole: Whole) -> None:
        """Raises CheckpointDamaged where the ranks' tables contradict each other or leave a gap."""
        self.url = whole.name
        self._data: dict[str, bytes] = {}
        self._tensors: dict[str, tuple[bytes, memoryview]] = {}  # container -> its header, and what follows
        parts, others = [], {}
        for snapshot in whole.of_ranks:
            index = snapshot.buffer.index()
            digests = snapshot.buffer.digests(len(index["files"]))
            part = Part.from_bytes(index["part"].encode(), f"{self.url}/part-{snapshot.writer}.json")
            files = {}
            for number, (name, header, start, stop) in enumerate(index["files"]):
                self._tensors[name] = header.encode("latin-1"), snapshot.buffer.view(start, stop)
                # A rank that was killed before its checksums had still finished its copy.
                files[name] = FileRecord(self.size(name), digests[number]) if digests else self.record(name)
            parts.append(replace(part, files=files))
            if snapshot.writer == 0:
                self._data[STATE] = index["state"].encode()
                others[STATE] = FileRecord.of(self._data[STATE])
        manifest = Manifest.of_parts(parts, others, time=0.0, producer={"world_size": len(parts)})
        self._data[MANIFEST] = manifest.to_bytes()

    def names(self) -> list[str]:
        """Of the files that it stands for."""
        return sorted([*self._data, *self._tensors])

    def size(self, name: str) -> int:
        """Bytes of a file."""
        if name in self._tensors:
            return sum(len(piece) for piece in self._tensors[name])
        return len(self._found(name))

    def range(self, name: str, start: int, length: int) -> memoryview:
        """A part of a file; of the header or of what follows, never across."""
        if name not in self._tensors:
            return memoryview(self._found(name))[start : start + length]
        header, rest = self._tensors[name]
        if start < len(header):
            return memoryview(header)[start : start + length]
        return rest[start - len(header) : start - len(header) + length]

    def record(self, name: str) -> FileRecord:
        """What a file holds now."""
        if name not in self._tensors:
            return FileRecord.of(self._found(name))
        return FileRecord(self.size(name), _sha256(*self._tensors[name]).hexdigest())

    def _found(self, name: str) -> bytes:
        if name not in self._data:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", name)
        return self._data[name]

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        yield io.BytesIO(self._found(name))

    def sub(self, name: str) -> Folder:
        """It holds none."""
        raise _read_only()

    def make(self) -> None:
        """It is there."""

    def publish(self, name: str, data: bytes) -> None:
        """Only its rank writes it."""
        raise _read_only()

    def touch(self, name: str, data: bytes) -> None:
        """Only its rank writes it."""
        raise _read_only()

    def stamp(self, name: str) -> str:
        """A snapshot that is read does not change."""
        return str(self.size(name))

    def delete(self, name: str) -> None:
        """Only its rank writes it."""
        raise _read_only()

    def remove(self) -> None:
        """Only its rank writes it."""
        raise _read_only()

    def _store(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        raise _read_only()


class _Buffer:
    """One snapshot's place in the memory."""

    def __init__(self, fd: int, place: int) -> None:
        self._fd, self._place = fd, place
        self._map = mmap.mmap(fd, PAGE, offset=place)

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes of its tensors."""
        self._reach(PAGE + stop)
        return memoryview(self._map)[PAGE + start : PAGE + stop]

    def reserve(self, stop: int) -> memoryview:
        """Room for that many bytes of tensors. Raises OSError where there is none, in place of a signal later on."""
        if PAGE + stop > len(self._map):
            wanted = min(max(2 * len(self._map), _pages(PAGE + stop)), BUFFER_BYTES)
            os.posix_fallocate(self._fd, self._place, wanted)
            self._reach(wanted)
        return memoryview(self._map)[PAGE:]

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """While entered the count is odd; it stays so where the change does not come to its end."""
        magic, count, *rest = self._header()
        count = count if magic == MAGIC else 0
        self._set(count | 1, *rest[:3])
        yield
        _, _, *rest = self._header()
        self._set((count | 1) + 1, *rest[:3])

    def finish(self, index: bytes, stop: int) -> None:
        """Write the index behind the tensors."""
        self.reserve(stop + len(index))[stop : stop + len(index)] = index
        _, count, *_ = self._header()
        self._set(count, stop, len(index), zlib.crc32(index))

    def add_digests(self, files: list[_File]) -> None:
        """The checksums of the files, once the steps go on."""
        for number, file in enumerate(files):
            place = DIGESTS_AT + DIGEST_BYTES * number
            self._map[place : place + DIGEST_BYTES] = _sha256(file.header, self.view(file.start, file.stop)).digest()
        _, count, *places, _ = self._header()
        self._set(count, *places, num_digests=len(files))

    def digests(self, files: int) -> list[str]:
        """Of that many files, in hexadecimal; none where their writer had not come to them."""
        if self._header()[-1] != files:
            return []
        places = [DIGESTS_AT + DIGEST_BYTES * number for number in range(files)]
        return [self._map[place : place + DIGEST_BYTES].hex() for place in places]

    def forget(self) -> None:
        """Hold no snapshot."""
        _, count, *places, _ = self._header()
        self._set(count | 1, *places)

    def index(self) -> dict[str, Any]:
        """What a finished snapshot says of itself. Raises CheckpointDamaged for one that is not."""
        magic, count, stop, length, crc, _ = self._header()
        if magic != MAGIC or count % 2 or not 0 < length <= MOST_INDEX_BYTES or stop < 0:
            raise CheckpointDamaged("there is no finished snapshot")
        text = bytes(self.view(stop, stop + length))
        if zlib.crc32(text) != crc:
            raise CheckpointDamaged("the index of a snapshot has changed")
        index: dict[str, Any] = json.loads(text)
        return index

    def _reach(self, stop: int) -> None:
        if stop > len(self._map):
            # The old one stays until nobody has a view of it.
            self._map = mmap.mmap(self._fd, _pages(stop), offset=self._place)

    def _header(self) -> tuple[Any, ...]:
        return HEADER.unpack_from(self._map)

    def _set(self, count: int, stop: int, length: int, crc: int, *, num_digests: int = 0) -> None:
        # Not pack_into, which fills with zeros first: a kill must find the old values or the new ones.
        self._map[: HEADER.size] = HEADER.pack(MAGIC, count, stop, length, crc, num_digests)


class _Mapped(Arena):
    """An arena in a buffer."""

    def __init__(self, buffer: _Buffer) -> None:
        super().__init__()
        self._buffer = buffer

    def put(self, data: NDArray[Any]) -> None:
        """Copy an array's elements to the end, in C order."""
        flat = data.reshape(-1).view(np.uint8)
        room = self._buffer.reserve(self.used + len(flat))
        np.frombuffer(room, np.uint8)[self.used : self.used + len(flat)] = flat
        self.used += len(flat)


def _read(buffer: _Buffer) -> Snapshot | None:
    try:
        index = buffer.index()
    except CheckpointDamaged:
        return None  # empty, or its writer was killed in it: the other buffer counts
    return Snapshot(index["nonce"], index["step"], index["writer"], index["writers"], buffer)


def _sha256(*pieces: bytes | memoryview) -> hashlib._Hash:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


def _read_only() -> OSError:
    return OSError(errno.EROFS, "a snapshot is written by its rank alone")
