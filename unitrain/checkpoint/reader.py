"""Reading a checkpoint: any box of any tensor, whoever wrote it, from verified bytes only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from ..strategy import TensorInfo
from .container import ELEMENT_TYPES, LENGTH_BYTES, Slot, header_length, parse_header
from .files import Folder, LocalFolder, RemoteFolder, open_folder
from .manifest import MANIFEST, MAX_MANIFEST_BYTES, STATE, Box, Manifest, Tensor

Verify = Literal["full", "manifest"]
_MAX_READING_THREADS = 8


class CheckpointReader:
    """One published checkpoint.

    With `verify="full"` a file's SHA-256 is compared before its first use, by each rank for the files it uses;
    with "manifest" only the manifest's own checksum, coverage and all sizes. Raises CheckpointDamaged, naming the
    file, where bytes differ or are gone, and CheckpointError where the storage fails.
    """

    def __init__(self, folder: Folder | str | os.PathLike[str], *, verify: Verify = "full") -> None:
        self._files = folder if isinstance(folder, Folder) else open_folder(folder)
        self.folder = self._files.url  # path or URL
        self.elsewhere = isinstance(self._files, LocalFolder | RemoteFolder)  # other processes can read it too
        self._trusted: set[str] = set()
        self._slots: dict[str, dict[str, Slot]] = {}
        with self._reading(MANIFEST):
            data = self._files.read(MANIFEST, most=MAX_MANIFEST_BYTES)
        self.digest = hashlib.sha256(data).hexdigest()  # the same on two ranks: they see the same checkpoint
        self.manifest = Manifest.from_bytes(data, f"{self.folder}/{MANIFEST}")
        for name, record in self.manifest.files.items():
            with self._reading(name):
                size = self._files.size(name)
            if size != record.size:
                raise CheckpointDamaged(
                    f"{self.folder}/{name} is damaged: it has {size} bytes, the manifest says {record.size}"
                )
        if verify == "manifest":
            self._trusted.update(self.manifest.files)

    @property
    def step(self) -> int:
        """Optimizer steps that had been done."""
        return self.manifest.step

    @property
    def producer(self) -> Mapping[str, Any]:
        """Strategy, framework, world size and versions that wrote it."""
        return self.manifest.producer

    @property
    def state(self) -> dict[str, Any]:
        """What the trainer saved beside the tensors."""
        self._trust(STATE)
        with self._reading(STATE):
            data = self._files.read(STATE, most=MAX_MANIFEST_BYTES)
        try:
            state = json.loads(data)  # leniently: what a Trainer keeps in `extra` may hold a NaN
        except (ValueError, RecursionError) as error:
            raise CheckpointDamaged(f"{self.folder}/{STATE} is damaged: {error}") from error
        if not isinstance(state, dict):
            raise CheckpointDamaged(f"{self.folder}/{STATE} is damaged: it holds a {type(state).__name__}, no object")
        return state

    @property
    def roles(self) -> list[str]:
        """Names of the models in it."""
        return sorted({tensor.role for tensor in self.manifest.tensors})

    def role(self, name: str) -> RoleReader:
        """The tensors of one model. Raises CheckpointMismatch where it holds none of that name."""
        tensors = [tensor for tensor in self.manifest.tensors if tensor.role == name]
        if not tensors:
            held = ", ".join(self.roles) or "no tensors"
            raise CheckpointMismatch(f"{self.folder} has no role {name!r}; it has {held}")
        return RoleReader(self, tensors)

    def verify(self) -> None:
        """Compare the SHA-256 of every file now, several at a time."""
        with ThreadPoolExecutor(min(_MAX_READING_THREADS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._trust, self.manifest.files):
                pass  # map raises what a file raised

    def rows(self, tensor: Tensor, box: Box, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop of a box, all of it where it has no dimensions; a view where files are local."""
        self._trust(box.file)
        slot = self._slots_of(box.file).get(box.key)
        if slot is None or (slot.dtype, slot.shape) != (tensor.dtype, box.shape):
            raise CheckpointDamaged(
                f"{self.folder}/{box.file} is damaged: it has no {box.key} of {tensor.dtype} {box.shape}"
            )
        if box.shape:
            row_bytes = slot.num_bytes // box.shape[0]
            slot = slot._replace(
                shape=(stop - start, *box.shape[1:]),
                start=slot.start + start * row_bytes,
                num_bytes=(stop - start) * row_bytes,
            )
        with self._reading(box.file):
            data = self._files.range(box.file, slot.start, slot.num_bytes)
        if len(data) != slot.num_bytes:
            raise CheckpointDamaged(f"{self.folder}/{box.file} ended while it was read")
        return slot.array(data)

    def _slots_of(self, name: str) -> dict[str, Slot]:
        if name not in self._slots:
            where, size = f"{self.folder}/{name}", self.manifest.files[name].size
            with self._reading(name):
                length = header_length(bytes(self._files.range(name, 0, LENGTH_BYTES)), size, where)
                header = bytes(self._files.range(name, LENGTH_BYTES, length))
            self._slots[name] = parse_header(header, size, where)
        return self._slots[name]

    def _trust(self, name: str) -> None:
        """Return when the file is known to hold what the manifest says."""
        if name in self._trusted:
            return
        with self._reading(name):
            found = self._files.record(name)
        if found != self.manifest.files[name]:
            raise CheckpointDamaged(
                f"{self.folder}/{name} is damaged: its SHA-256 is {found.sha256[:16]}..., "
                f"the manifest says {self.manifest.files[name].sha256[:16]}..."
            )
        self._trusted.add(name)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise CheckpointDamaged(f"{self.folder} lacks {name}") from error
        except OSError as error:
            raise CheckpointError(f"{self.folder}/{name} could not be read: {error}") from error


class RoleReader:
    """The tensors of one role: the ShardReader that an engine loads from."""

    def __init__(self, checkpoint: CheckpointReader, tensors: list[Tensor]) -> None:
        self._checkpoint, self._role = checkpoint, tensors[0].role
        self._held = {(tensor.kind, tensor.name): tensor for tensor in tensors}

    @property
    def place(self) -> tuple[str, str, str] | None:
        """Folder, role and the manifest's digest, for another process to read the same; None where none can."""
        found = self._checkpoint
        return (found.folder, self._role, found.digest) if found.elsewhere else None

    @property
    def tensors(self) -> Mapping[tuple[str, str], TensorInfo]:
        """(kind, canonical name) -> dtype and global shape."""
        return {pair: TensorInfo(tensor.dtype, tensor.shape) for pair, tensor in self._held.items()}

    def read(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[Any]:
        """The box of that shape at that offset, a fresh array; bfloat16 as uint16.

        Raises CheckpointMismatch where there is no such tensor or box, CheckpointDamaged where bytes differ.
        """
        tensor = self._held.get((kind, name))
        if tensor is None:
            raise CheckpointMismatch(f"{self._checkpoint.folder} has no {kind} {name!r}")
        if not _inside(offset, shape, tensor.shape):
            raise CheckpointMismatch(
                f"{self._checkpoint.folder} has {kind} {name!r} of shape {tensor.shape}: "
                f"no box of shape {tuple(shape)} fits in it at {tuple(offset)}"
            )
        wanted = np.empty(shape, dtype=ELEMENT_TYPES[tensor.dtype].numpy)
        for box in tensor.boxes:
            starts = [max(ours, theirs) for ours, theirs in zip(offset, box.offset, strict=True)]
            stops = [
                min(ours + length, theirs + held)
                for ours, length, theirs, held in zip(offset, shape, box.offset, box.shape, strict=True)
            ]
            if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
                continue
            here = tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, offset, strict=True))
            there = tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, box.offset, strict=True))
            first = there[0] if there else slice(0, 1)
            rows = self._checkpoint.rows(tensor, box, first.start, first.stop)
            wanted[here] = rows[(slice(None), *there[1:])] if there else rows
        return wanted


def _inside(offset: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(offset) == len(shape) == len(whole) and all(
        start >= 0 and length >= 0 and start + length <= size
        for start, length, size in zip(offset, shape, whole, strict=True)
    )
