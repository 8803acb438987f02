"""Our containers are safetensors files, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from unitrain.checkpoint.container import (
    ELEMENT_TYPES,
    LENGTH_BYTES,
    header_bytes,
    header_length,
    parse_header,
)
from unitrain.errors import CheckpointDamaged

pytestmark = pytest.mark.fast


def read_back(data: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    length = header_length(data[:LENGTH_BYTES], len(data), "file")
    slots = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data), "file")
    return {key: tuple(slot) for key, slot in slots.items()}


def container(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_header_is_read_as_it_was_written() -> None:
    header = header_bytes([("t0", "bfloat16", (2, 3)), ("t1", "bool", ()), ("t2", "int64", (0, 4))])
    assert len(header) % 64 == 0
    assert read_back(header + bytes(13)) == {
        "t0": ("bfloat16", (2, 3), len(header), 12),
        "t1": ("bool", (), len(header) + 12, 1),
        "t2": ("int64", (0, 4), len(header) + 13, 0),
    }


@pytest.mark.parametrize("dtype", sorted(ELEMENT_TYPES))
def test_the_official_reader_reads_it(dtype: str, tmp_path: Path) -> None:
    values = np.arange(6).astype(ELEMENT_TYPES[dtype].numpy).reshape(2, 3)
    (tmp_path / "a.safetensors").write_bytes(header_bytes([("t000000", dtype, (2, 3))]) + values.tobytes())
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as opened:
        part = opened.get_slice("t000000")
        assert (part.get_shape(), part.get_dtype()) == ([2, 3], ELEMENT_TYPES[dtype].code)
        if dtype != "bfloat16":  # which numpy has not
            np.testing.assert_array_equal(opened.get_tensor("t000000"), values)


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        bytes(8),
        (1 << 63).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        (200_000_000).to_bytes(8, "little") + b"{}",
        container(b"{"),
        container(b"\xff{}"),
        container([]),
        container({"a": 1}),
        container({"a": entry()}, bytes(3)),
        container({"a": entry()}, bytes(5)),
        container({"a": entry(shape=(5,))}, bytes(4)),
        container({"a": entry(shape=(-4, -1))}, bytes(4)),
        container({"a": entry(shape=(4.0,))}, bytes(4)),
        container({"a": entry(shape=(True,), offsets=(0, 1))}, bytes(1)),
        container({"a": entry(shape="4")}, bytes(4)),
        container({"a": entry(dtype="PICKLE")}, bytes(4)),
        container({"a": entry(dtype=["U8"])}, bytes(4)),
        container({"a": entry(offsets=(4, 0))}, bytes(4)),
        container({"a": entry(offsets=(0, 4, 8))}, bytes(4)),
        container({"a": entry(offsets=(1, 5))}, bytes(5)),
        container({"a": entry(), "b": entry()}, bytes(4)),
        container({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)),
        container({"a": entry(), "b": entry(offsets=(6, 10))}, bytes(10)),
        container(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', bytes(1)),
        container(b'{"a":' * 100_000),
        container(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', bytes(1)),
    ],
)
def test_whatever_is_no_container_is_damage(data: bytes) -> None:
    with pytest.raises(CheckpointDamaged):
        read_back(data)
