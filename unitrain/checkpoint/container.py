"""The safetensors container: element types, and a header written and read without any framework.

Layout: 8 bytes little-endian length of the header, the header (JSON), then the tensors' bytes without a gap.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointDamaged
from .strict import load_json

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LENGTH_BYTES = 8
_ALIGNMENT = 64  # a cache line; the format asks for nothing


class ElementType(NamedTuple):
    """How elements of a dtype lie in a file and in numpy."""

    code: str  # safetensors' name
    numpy: np.dtype[Any]


ELEMENT_TYPES: Mapping[str, ElementType] = MappingProxyType({
    name: ElementType(code, np.dtype(stored))
    for name, code, stored in (
        ("bool", "BOOL", "?"),
        ("uint8", "U8", "u1"),
        ("uint16", "U16", "<u2"),
        ("uint32", "U32", "<u4"),
        ("uint64", "U64", "<u8"),
        ("int8", "I8", "i1"),
        ("int16", "I16", "<i2"),
        ("int32", "I32", "<i4"),
        ("int64", "I64", "<i8"),
        ("float16", "F16", "<f2"),
        ("bfloat16", "BF16", "<u2"),  # numpy has none: its bits travel as uint16
        ("float32", "F32", "<f4"),
        ("float64", "F64", "<f8"),
        ("complex64", "C64", "<c8"),
    )
})  # fmt: skip


class Slot(NamedTuple):
    """Where one tensor lies in a container."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    num_bytes: int

    def array(self, data: memoryview) -> NDArray[Any]:
        """The tensor's bytes as an array, not copied."""
        return np.frombuffer(data, ELEMENT_TYPES[self.dtype].numpy).reshape(self.shape)


def header_bytes(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length and header of a container that holds these (key, dtype, shape) in this order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, dtype, shape in tensors:
        start, end = end, end + num_bytes(dtype, shape)
        entries[key] = {"dtype": ELEMENT_TYPES[dtype].code, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % _ALIGNMENT)
    assert len(text) <= MAX_HEADER_BYTES
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_length(prefix: bytes, file_bytes: int, where: str) -> int:
    """Bytes of the header, from a container's first eight. Raises CheckpointDamaged where it cannot be."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) != LENGTH_BYTES or length > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise CheckpointDamaged(f"{where} is no safetensors file: its header claims {length} of {file_bytes} bytes")
    return length


def parse_header(text: bytes, file_bytes: int, where: str) -> dict[str, Slot]:
    """The slots of a container by key. Raises CheckpointDamaged unless they fill the file without gap or overlap."""
    names = {element.code: name for name, element in ELEMENT_TYPES.items()}
    slots: dict[str, Slot] = {}
    base = LENGTH_BYTES + len(text)
    try:
        entries = load_json(text)
        entries.pop("__metadata__", None)
        for key, entry in entries.items():
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
                raise ValueError(f"{key!r} has a place or a shape that is not made of whole numbers")
            slots[key] = Slot(names[entry["dtype"]], shape, base + start, stop - start)
            if stop - start != num_bytes(slots[key].dtype, shape):
                raise ValueError(f"{key!r} has {stop - start} bytes, which do not fit shape {shape}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointDamaged(f"{where} has a header that cannot be used: {error}") from error
    end = base
    for slot in sorted(slots.values(), key=lambda slot: (slot.start, slot.num_bytes)):
        if slot.start != end:
            raise CheckpointDamaged(f"{where} has a gap or an overlap at byte {min(slot.start, end)}")
        end += slot.num_bytes
    if end != file_bytes:
        raise CheckpointDamaged(f"{where} has {file_bytes} bytes, but its header describes {end}")
    return slots


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * ELEMENT_TYPES[dtype].numpy.itemsize
