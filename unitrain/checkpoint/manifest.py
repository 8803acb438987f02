"""What a checkpoint holds: its manifest, read strictly, and the proof that each element is there exactly once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from .container import ELEMENT_TYPES, num_bytes
from .files import FileRecord
from .strict import seal, unseal

FORMAT = 1
MANIFEST, STATE = "MANIFEST.json", "state.json"
MAX_MANIFEST_BYTES = 256 << 20

_MOST = 1 << 56  # of any count here: far above every machine, and no product of it with an element's size overflows
_MAX_DIMENSIONS = 32
_CONTAINER = re.compile(r"part-\d{1,9}-\d{1,9}\.safetensors")
_FILE = re.compile(rf"{_CONTAINER.pattern}|part-\d{{1,9}}\.json|state\.json")
_KEY = re.compile(r"t\d{6,12}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

_T = TypeVar("_T")


class Box(NamedTuple):
    """A part of a tensor and where it lies."""

    file: str
    key: str  # in the file; says nothing of the tensor's name
    offset: tuple[int, ...]  # of the part in the tensor
    shape: tuple[int, ...]  # of the part; never empty


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One named logical tensor and its parts."""

    role: str
    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        for what, label in (("role", self.role), ("kind", self.kind)):
            if not _LABEL.fullmatch(label):
                raise ValueError(f"{what} {label!r} is no word of at most 63 letters, digits, '.', '_' and '-'")
        if not 0 < len(self.name) <= 1024 or not self.name.isprintable():
            raise ValueError(f"tensor name {self.name[:80]!r} is not 1 to 1024 printable characters")
        if self.dtype not in ELEMENT_TYPES:
            raise ValueError(f"{self} has dtype {self.dtype!r}; a checkpoint holds {', '.join(ELEMENT_TYPES)}")
        if len(self.shape) > _MAX_DIMENSIONS or math.prod(max(size, 1) for size in self.shape) > _MOST:
            raise ValueError(f"{self} has shape {self.shape}, which no machine holds")

    @cached_property
    def identity(self) -> tuple[str, str, str]:
        """What sets a tensor apart from all others of a checkpoint."""
        return self.role, self.kind, self.name

    def __str__(self) -> str:
        return f"{self.role} {self.kind} {self.name!r}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one writer has written."""

    step: int
    writer: int
    writers: int
    files: Mapping[str, FileRecord]
    tensors: tuple[Tensor, ...]

    def to_bytes(self) -> bytes:
        """Its JSON, sealed."""
        own = {"step": self.step, "writer": self.writer, "writers": self.writers}
        return seal({"format": FORMAT, **own, **_contents(self.files, self.tensors)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Part:
        """Read it strictly. Raises CheckpointDamaged."""

        def read(document: dict[str, Any]) -> Part:
            _keys(document, "step", "writer", "writers", "files", "tensors")
            return cls(
                step=_whole(document["step"]),
                writer=_whole(document["writer"]),
                writers=_whole(document["writers"]),
                files=_files(document["files"]),
                tensors=_tensors(document["tensors"]),
            )

        return _strictly(read, data, where)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a whole checkpoint holds."""

    step: int
    time: float  # seconds since 1970 by the writer's clock; for people, and between two checkpoints of one step
    producer: Mapping[str, Any]  # strategy, framework, world size, versions
    files: Mapping[str, FileRecord]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of_parts(
        cls, parts: Sequence[Part], others: Mapping[str, FileRecord], *, time: float, producer: Mapping[str, Any]
    ) -> Manifest:
        """Join what the writers wrote, and other files. Raises CheckpointError for contradictions and gaps."""
        files = dict(others)
        seen: dict[tuple[str, str, str], Tensor] = {}
        boxes: dict[tuple[str, str, str], list[Box]] = {}
        for part in parts:
            files.update(part.files)
            for tensor in part.tensors:
                known = seen.setdefault(tensor.identity, tensor)
                if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                    raise CheckpointError(
                        f"writer {part.writer} has {tensor} as {tensor.dtype} {tensor.shape}, another as "
                        f"{known.dtype} {known.shape}: all ranks must hold parts of the same tensor"
                    )
                boxes.setdefault(tensor.identity, []).extend(tensor.boxes)
        tensors = tuple(replace(tensor, boxes=tuple(boxes[identity])) for identity, tensor in seen.items())
        for tensor in tensors:
            prove_coverage(tensor)
        return cls(step=parts[0].step, time=time, producer=producer, files=files, tensors=tensors)

    def to_bytes(self) -> bytes:
        """Its JSON, sealed. Raises CheckpointError where it would be larger than readers accept."""
        own = {"step": self.step, "time": self.time, "producer": dict(self.producer)}
        data = seal({"format": FORMAT, **own, **_contents(self.files, self.tensors)})
        if len(data) > MAX_MANIFEST_BYTES:
            raise CheckpointError(
                f"the manifest of step {self.step} has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}: "
                "save larger or fewer parts of tensors"
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Read it strictly and prove coverage. Raises CheckpointDamaged; CheckpointMismatch for a later format."""

        def read(document: dict[str, Any]) -> Manifest:
            _keys(document, "step", "time", "producer", "files", "tensors")
            if not isinstance(document["producer"], dict):
                raise ValueError("its producer is no object")
            if type(document["time"]) not in (int, float) or not 0 <= document["time"] < _MOST:
                raise ValueError(f"its time is {document['time']!r}")
            files, tensors = _files(document["files"]), _tensors(document["tensors"])
            if STATE not in files:
                raise ValueError(f"it lists no {STATE}")
            _require_room(files, tensors)
            return cls(
                step=_whole(document["step"]),
                time=float(document["time"]),
                producer=document["producer"],
                files=files,
                tensors=tensors,
            )

        manifest = _strictly(read, data, where)
        for tensor in manifest.tensors:
            prove_coverage(tensor)
        return manifest


def prove_coverage(tensor: Tensor) -> None:
    """Raise CheckpointDamaged unless each element of the tensor is in exactly one of its boxes.

    Boxes in bounds, no two that meet, and volumes that sum to the tensor's.
    """
    held = 0
    for box in tensor.boxes:
        spans = list(zip(box.offset, box.shape, strict=False))
        fits = len(box.offset) == len(box.shape) == len(tensor.shape) and all(
            start >= 0 and length > 0 and start + length <= size
            for (start, length), size in zip(spans, tensor.shape, strict=True)
        )
        if not fits:
            raise CheckpointDamaged(
                f"{tensor} has shape {tensor.shape}: no box of shape {box.shape} fits in it at {box.offset}"
            )
        held += math.prod(box.shape)
    if len(tensor.boxes) > 1:
        starts = np.array([box.offset for box in tensor.boxes], dtype=np.int64)
        stops = starts + np.array([box.shape for box in tensor.boxes], dtype=np.int64)
        if meeting := _meeting_pair(starts, stops):
            one, other = (tensor.boxes[number] for number in meeting)
            raise CheckpointDamaged(
                f"{tensor} is held twice: boxes {one.offset}+{one.shape} and {other.offset}+{other.shape} overlap"
            )
    if held != math.prod(tensor.shape):
        raise CheckpointDamaged(f"{tensor} has {math.prod(tensor.shape)} elements, but its boxes hold {held}")


def _meeting_pair(starts: np.ndarray[Any, Any], stops: np.ndarray[Any, Any]) -> tuple[int, int] | None:
    """Two boxes that share an element, if any do.

    Cuts the boxes apart along any axis where a plane goes through none of them, and compares pairs only within
    what cannot be cut. Every sharding of the field is cut to single boxes, in O(n log n).
    """
    waiting = [np.arange(len(starts))]
    while waiting:
        group = waiting.pop()
        if len(group) < 2:
            continue
        for axis in range(starts.shape[1]):
            order = group[np.argsort(starts[group, axis], kind="stable")]
            reached = np.maximum.accumulate(stops[order, axis])
            cuts = np.flatnonzero(starts[order[1:], axis] >= reached[:-1]) + 1
            if len(cuts):
                waiting += np.split(order, cuts)
                break
        else:
            for place, number in enumerate(group[:-1]):
                others = group[place + 1 :]
                meets = ((starts[number] < stops[others]) & (starts[others] < stops[number])).all(axis=1)
                if meets.any():
                    return int(number), int(others[meets.argmax()])
    return None


def _contents(files: Mapping[str, FileRecord], tensors: Iterable[Tensor]) -> dict[str, Any]:
    return {
        "files": {name: record._asdict() for name, record in files.items()},
        "tensors": [
            {
                "role": tensor.role,
                "kind": tensor.kind,
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "boxes": [box._asdict() for box in tensor.boxes],
            }
            for tensor in tensors
        ],
    }


def _strictly(read: Callable[[dict[str, Any]], _T], data: bytes, where: str) -> _T:
    """What `read` makes of a sealed document; whatever it stumbles over is damage."""
    document = unseal(data, where)
    try:
        if (written := _whole(document.pop("format"))) > FORMAT:
            raise CheckpointMismatch(
                f"{where} has format {written}, this unitrain reads up to {FORMAT}: install the version that wrote it"
            )
        if written != FORMAT:
            raise ValueError(f"its format is {written}")
        return read(document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointDamaged(f"{where} is damaged: {error}") from error


def _keys(found: Mapping[str, Any], *wanted: str) -> None:
    if set(found) != set(wanted):
        raise ValueError(f"an object has the keys {sorted(found)[:8]} in place of {sorted(wanted)}")


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError(f"{str(value)[:40]!r} is no whole number from 0 to {_MOST}")
    return value


def _wholes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{str(values)[:40]!r} is no list of whole numbers")
    return tuple(_whole(value) for value in values)


def _word(value: Any, form: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ValueError(f"{str(value)[:80]!r} is no {what}")
    return value


def _files(found: dict[str, Any]) -> dict[str, FileRecord]:
    files = {}
    for name, record in found.items():
        _keys(record, "size", "sha256")
        sha256 = _word(record["sha256"], _SHA256, "SHA-256")
        files[_word(name, _FILE, "name of a checkpoint's file")] = FileRecord(_whole(record["size"]), sha256)
    return files


def _tensors(found: Any) -> tuple[Tensor, ...]:
    if not isinstance(found, list):
        raise ValueError("its tensors are no list")
    tensors = tuple(_tensor(entry) for entry in found)
    if len({tensor.identity for tensor in tensors}) != len(tensors):
        raise ValueError("it lists a tensor twice")
    return tensors


def _tensor(entry: dict[str, Any]) -> Tensor:
    _keys(entry, "role", "kind", "name", "dtype", "shape", "boxes")
    for key in ("role", "kind", "name", "dtype"):
        if not isinstance(entry[key], str):
            raise ValueError(f"the {key} of a tensor is {str(entry[key])[:40]!r}")
    if not isinstance(entry["boxes"], list):
        raise ValueError("the boxes of a tensor are no list")
    boxes = tuple(_box(box) for box in entry["boxes"])
    return Tensor(**{**entry, "shape": _wholes(entry["shape"]), "boxes": boxes})


def _box(entry: dict[str, Any]) -> Box:
    _keys(entry, "file", "key", "offset", "shape")
    return Box(
        file=_word(entry["file"], _CONTAINER, "name of a container"),
        key=_word(entry["key"], _KEY, "key of a tensor"),
        offset=_wholes(entry["offset"]),
        shape=_wholes(entry["shape"]),
    )


def _require_room(files: Mapping[str, FileRecord], tensors: Iterable[Tensor]) -> None:
    """Raise ValueError where boxes share bytes, lie in no file, or hold more than their files."""
    seen: set[tuple[str, str]] = set()
    held = dict.fromkeys(files, 0)
    for tensor in tensors:
        for box in tensor.boxes:
            if box.file not in files:
                raise ValueError(f"{tensor} lies in {box.file}, which it does not list")
            if (box.file, box.key) in seen:
                raise ValueError(f"{box.key} of {box.file} stands for two boxes")
            seen.add((box.file, box.key))
            held[box.file] += num_bytes(tensor.dtype, box.shape)
            if held[box.file] > files[box.file].size:
                raise ValueError(f"its boxes hold more bytes than {box.file} has")
