"""Saving a run's checkpoints: the step waits for one copy in memory, the rest happens behind it.

No collectives: every writer writes its files and then its part table; writer 0 waits for all part tables, proves
that they cover every tensor, and publishes the manifest. Until then the checkpoint does not exist.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..errors import CheckpointError
from ..strategy import Shard
from .arena import Arena
from .container import ELEMENT_TYPES, header_bytes
from .fence import Replaced, refuse_replaced
from .files import FileRecord, Folder, open_folder
from .manifest import MANIFEST, MAX_MANIFEST_BYTES, STATE, Box, Manifest, Part, Tensor
from .retention import FolderName, abandoned, doomed
from .strict import intact

PATIENCE_SECONDS = 600.0
FILE_BYTES = 128 << 20  # several files are written, and later read, at once

_MAX_TENSORS_PER_FILE = 100_000  # keeps the header far below the format's limit
_WRITING_THREADS = 4
_CLOSING_SECONDS = 5.0
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.005, 1.0
_NONCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """How one save of one writer ended. For writer 0 `ok` means published, for others that their part is durable."""

    step: int
    name: str  # of the folder under the root
    ok: bool
    seconds: float  # from the call of `save` until it was durable, or had failed; old ones are deleted after that
    stall_seconds: float  # of these, how long the caller waited for the copy; an earlier save's end not counted
    bytes: int  # of this writer's tensors
    error: str | None = None  # with `ok`: what went wrong afterwards, while old checkpoints were deleted


class Saver:
    """Saves checkpoints of one attempt of a run, in the background where asked; one per rank.

    `nonce` is the attempt's, the same on all writers and never used before. `producer` goes into the manifest.
    `report` is called once for each save, from the background thread where saving is asynchronous. A save that
    fails leaves the previous checkpoint in place; `wait` raises what happened. An attempt that another one has replaced
    (see `fence`) publishes and deletes nothing: its next call raises Replaced. A process that ends without `close`
    gives up the save under way, which harms nothing.
    """

    def __init__(
        self,
        root: str,
        *,
        writer: int,
        writers: int,
        nonce: str,
        keep: int,
        asynchronous: bool,
        producer: Mapping[str, Any],
        report: Callable[[SaveReport], None],
        patience_seconds: float = PATIENCE_SECONDS,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        if not 0 <= writer < writers or keep < 1:
            raise ValueError(f"writer {writer} of {writers} keeping {keep} cannot be: count writers from 0, keep one")
        if not _NONCE.fullmatch(nonce):
            raise ValueError(f"nonce {nonce!r} is not 1 to 48 letters, digits, '_' and '-'")
        self.failures = 0  # saves failed in a row
        self._root = open_folder(root)
        self._writer, self._writers = writer, writers
        self._nonce, self._keep = nonce, keep
        self._asynchronous = asynchronous
        self._producer = dict(producer)
        self._report = report
        self._patience_seconds = patience_seconds
        self._file_bytes = file_bytes
        self._arena = Arena()
        self._known: dict[Any, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._broken: BaseException | None = None  # what ended the thread and is no failed save: a bug, or the report's
        self._last_step, self._tries = -1, 0
        self._closing = threading.Event()

    def save(self, step: int, shards: Mapping[str, Iterable[Shard]], state: Mapping[str, Any]) -> None:
        """Copy this rank's shards of each role, then write them; returns after the copy when asynchronous.

        Waits for the save under way, and does not raise for its failure. All writers must call it for the same
        steps in the same order. Raises CheckpointError, before anything is written, for shards or a state that no
        checkpoint can hold.
        """
        self._join()
        started = time.perf_counter()
        self._tries = self._tries + 1 if step == self._last_step else 1
        self._last_step, self._error = step, None
        snapshot = _Snapshot(
            name=FolderName(step, self._nonce, self._tries),
            items=copied(self._arena, shards, self._known),
            state=state_bytes(state),
            started=started,
            stall_seconds=time.perf_counter() - started,
        )
        if self._asynchronous:
            self._thread = threading.Thread(target=self._run_behind, args=(snapshot,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run(snapshot)

    def wait(self) -> None:
        """Until the last save has ended. Raises CheckpointError if it failed."""
        self._join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the save under way and free the host memory. A failed save has been reported already.

        Other writers get a few seconds for their parts, not all of `patience_seconds`: after a failure of the
        training they may be gone. Call `wait` first where the save matters.
        """
        self._closing.set()
        self._join()
        self._arena = Arena()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._broken is not None:
            broken, self._broken = self._broken, None
            raise broken

    def _run_behind(self, snapshot: _Snapshot) -> None:
        try:
            self._run(snapshot)
        except BaseException as error:  # the thread's last act: the caller's thread raises it
            self._broken = error

    def _run(self, snapshot: _Snapshot) -> None:
        """One save from its copy to its report."""
        folder = self._root.sub(str(snapshot.name))
        error: CheckpointError | None = None
        trouble: str | None = None
        try:
            refuse_replaced(self._root, self._nonce)
            trouble = self._tidied(self._sweep, snapshot.name)
            self._write(folder, snapshot)
            if self._writer == 0:
                self._publish(folder, snapshot)
        except Exception as cause:  # of any storage library: none of them may end the training
            error = CheckpointError(f"checkpoint {folder.url} failed, the previous one stays: {_told(cause)}")
            error.__cause__ = cause
            self._give_up(folder, error)
        seconds = time.perf_counter() - snapshot.started
        if error is None:
            try:
                refuse_replaced(self._root, self._nonce)  # by now: then the other may read it, and decides what goes
                trouble = self._tidied(self._retain, snapshot.name) or trouble
            except Exception as cause:  # of any storage library
                error = CheckpointError(f"checkpoint {folder.url} may not count: {_told(cause)}")
                error.__cause__ = cause
        self._error = error
        self.failures = self.failures + 1 if error else 0
        self._report(
            SaveReport(
                step=snapshot.name.step,
                name=str(snapshot.name),
                ok=error is None,
                seconds=seconds,
                stall_seconds=snapshot.stall_seconds,
                bytes=self._arena.used,
                error=str(error) if error else trouble,
            )
        )
        if error is not None and isinstance(error.__cause__, Replaced):
            raise error.__cause__  # nothing that this attempt does will ever count

    def _write(self, folder: Folder, snapshot: _Snapshot) -> None:
        """This writer's files, and last its part table."""
        folder.make()
        tensors = {item.tensor.identity: item.tensor for item in snapshot.items}
        boxes: dict[tuple[str, str, str], list[Box]] = {}
        contents: dict[str, list[bytes | memoryview]] = {}
        for number, items in enumerate(grouped(snapshot.items, self._file_bytes)):
            name = f"part-{self._writer}-{number}.safetensors"
            keys = [f"t{place:06d}" for place in range(len(items))]
            header = header_bytes([(key, item.tensor.dtype, item.shape) for key, item in zip(keys, items, strict=True)])
            contents[name] = [header, *self._arena.chunks(items[0].start, items[-1].stop)]
            for key, item in zip(keys, items, strict=True):
                boxes.setdefault(item.tensor.identity, []).append(Box(name, key, item.offset, item.shape))
        # While some files wait for the disk, others are hashed and copied.
        with ThreadPoolExecutor(_WRITING_THREADS) as pool:
            files = dict(zip(contents, pool.map(folder.write, contents, contents.values()), strict=True))
        part = Part(
            step=snapshot.name.step,
            writer=self._writer,
            writers=self._writers,
            files=files,
            tensors=tuple(replace(tensor, boxes=tuple(boxes.get(key, ()))) for key, tensor in tensors.items()),
        )
        folder.publish(f"part-{self._writer}.json", part.to_bytes())

    def _publish(self, folder: Folder, snapshot: _Snapshot) -> None:
        """Wait for all parts, prove that they are a whole, and make it exist."""
        tables = self._collect(folder, snapshot.name.step)
        parts = [part for part, _ in tables]
        for part in parts:
            for name, record in part.files.items():
                if (size := folder.size(name)) != record.size:
                    raise CheckpointError(f"{name} has {size} bytes, writer {part.writer} wrote {record.size}")
        files = {f"part-{part.writer}.json": record for part, record in tables}
        files[STATE] = folder.write(STATE, [snapshot.state])
        manifest = Manifest.of_parts(parts, files, time=time.time(), producer=self._producer)
        refuse_replaced(self._root, self._nonce)
        folder.publish(MANIFEST, manifest.to_bytes())

    def _collect(self, folder: Folder, step: int) -> list[tuple[Part, FileRecord]]:
        """The part tables of all writers and their files, waiting for those that are behind."""
        parts: dict[int, tuple[Part, FileRecord]] = {}
        began = time.monotonic()
        pause = _FIRST_POLL_SECONDS
        while True:
            there = set(folder.names())
            for writer in range(self._writers):
                if f"part-{writer}.failed" in there:
                    reason = folder.read(f"part-{writer}.failed", most=1 << 20).decode(errors="replace")
                    raise CheckpointError(f"writer {writer} could not write its part: {reason}")
                if writer not in parts and f"part-{writer}.json" in there:
                    data = folder.read(f"part-{writer}.json", most=MAX_MANIFEST_BYTES)
                    part = Part.from_bytes(data, f"{folder.url}/part-{writer}.json")
                    if (part.step, part.writer, part.writers) != (step, writer, self._writers):
                        raise CheckpointError(
                            f"part-{writer}.json is of step {part.step}, writer {part.writer} of {part.writers}: "
                            f"expected step {step}, writer {writer} of {self._writers}"
                        )
                    parts[writer] = part, FileRecord.of(data)
            if len(parts) == self._writers:
                return [parts[writer] for writer in range(self._writers)]
            patience = min(self._patience_seconds, _CLOSING_SECONDS if self._closing.is_set() else math.inf)
            if time.monotonic() - began > patience:
                absent = ", ".join(str(writer) for writer in range(self._writers) if writer not in parts)
                raise CheckpointError(f"no part from writer {absent} in {patience:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LAST_POLL_SECONDS)

    def _give_up(self, folder: Folder, error: CheckpointError) -> None:
        """Free what this writer has written and tell writer 0; writer 0 frees all.

        What fails here has failed before, and its first error is the one that is reported.
        """
        if self._writer == 0:
            with contextlib.suppress(Exception):
                _discard(folder)
            return
        with contextlib.suppress(Exception):
            for name in folder.names():
                if name.startswith((f"part-{self._writer}-", f"part-{self._writer}.")):
                    folder.delete(name)
        with contextlib.suppress(Exception):
            folder.publish(f"part-{self._writer}.failed", _told(error.__cause__).encode())

    def _tidied(self, tidy: Callable[[FolderName], None], name: FolderName) -> str | None:
        """What went wrong while writer 0 tidied, if anything did: told, and no failure of the save."""
        if self._writer == 0:
            try:
                tidy(name)
            except Exception as error:  # of any storage library
                return f"old checkpoints of {self._root.url} could not be deleted: {_told(error)}"
        return None

    def _sweep(self, coming: FolderName) -> None:
        """Delete saves that never came to an end, before the next one: they may be what fills the disk."""
        unpublished = [name for name in self._folder_names() if MANIFEST not in self._root.sub(str(name)).names()]
        for name in abandoned(unpublished, coming=coming):
            self._root.sub(str(name)).remove()

    def _retain(self, published: FolderName) -> None:
        """Delete what the new checkpoint replaces."""
        finished = [name for name in self._folder_names() if self._is_published(name)]
        for name in doomed(finished, keep=self._keep, newest=published):
            _discard(self._root.sub(str(name)))

    def _folder_names(self) -> list[FolderName]:
        """Those that may be deleted."""
        names = [name for text in self._root.names() if (name := FolderName.parse(text))]
        return [name for name in names if not self._root.linked(str(name))]

    def _is_published(self, name: FolderName) -> bool:
        """True where there is a manifest with its bytes unchanged; a damaged one is kept for inspection."""
        folder = self._root.sub(str(name))
        return MANIFEST in folder.names() and intact(folder.read(MANIFEST, most=MAX_MANIFEST_BYTES))


class _Item(NamedTuple):
    """A shard in the arena."""

    tensor: Tensor  # without boxes
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """All of one save that the training may not change any more."""

    name: FolderName
    items: list[_Item]
    state: bytes
    started: float
    stall_seconds: float


def copied(arena: Arena, shards: Mapping[str, Iterable[Shard]], known: dict[Any, Tensor]) -> list[_Item]:
    """Copy every shard; raises CheckpointError for one that contradicts itself.

    `known` holds the tensors of earlier saves, which are the same ones: only new ones need a check.
    """
    arena.clear()
    items = []
    seen: dict[tuple[str, str, str], Tensor] = {}
    for role, of_role in shards.items():
        for shard in of_role:
            name, kind, dtype, whole, offset, data = shard
            tensor = known.get((role, kind, name, dtype, whole))
            if tensor is None:
                tensor = known[role, kind, name, dtype, whole] = _tensor(role, shard)
            if seen.setdefault(tensor.identity, tensor) is not tensor:
                raise CheckpointError(f"{tensor} came with two dtypes or shapes")
            if data.dtype != ELEMENT_TYPES[dtype].numpy:
                raise CheckpointError(f"{tensor} is {dtype}, but its shard holds {data.dtype}")
            if not len(offset) == data.ndim == len(whole):
                raise CheckpointError(f"{tensor} has shape {whole}, but its shard {data.shape} at {offset}")
            start = arena.used
            arena.put(data)
            items.append(_Item(tensor, tuple(offset), data.shape, start, arena.used))
    return items


def _tensor(role: str, shard: Shard) -> Tensor:
    try:
        return Tensor(
            role=role, kind=shard.kind, name=shard.name, dtype=shard.dtype, shape=tuple(shard.shape), boxes=()
        )
    except ValueError as error:
        raise CheckpointError(f"a checkpoint cannot hold this shard: {error}") from error


def grouped(items: Iterable[_Item], file_bytes: int) -> Iterator[list[_Item]]:
    """The items of each file, in order: no file larger than asked unless one item is. Empty items are in none."""
    group: list[_Item] = []
    for item in items:
        if item.start == item.stop:
            continue
        if group and (item.stop - group[0].start > file_bytes or len(group) == _MAX_TENSORS_PER_FILE):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _discard(folder: Folder) -> None:
    """Delete a checkpoint: its manifest first and for good, so that no half of it is ever taken for a whole."""
    folder.delete(MANIFEST)
    folder.remove()


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """The trainer's state as JSON. Raises CheckpointError where it is none."""
    try:
        return json.dumps(state).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the trainer's state is not JSON: {error}; keep numbers, strings, lists and dicts"
        ) from error


def _told(error: BaseException | None) -> str:
    """One line for people. Our own errors say all; others also need their kind."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
