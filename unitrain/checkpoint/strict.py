"""JSON that is exactly what was written: no duplicate keys, no NaN, and a seal against changed bytes."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from ..errors import CheckpointDamaged

# The last key of a sealed document holds the SHA-256 of all bytes before it, so that it stays plain JSON.
_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n')
_SEAL_BYTES = len(',"sha256":""}\n') + 64


def seal(document: dict[str, Any]) -> bytes:
    """A JSON object as text that carries its own checksum; the document must not be empty."""
    body = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()[:-1]
    return body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def intact(data: bytes) -> bool:
    """True when the bytes are those that were sealed."""
    found = _SEAL.fullmatch(data, max(len(data) - _SEAL_BYTES, 0))
    return found is not None and hashlib.sha256(data[:-_SEAL_BYTES]).hexdigest().encode() == found[1]


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The document without its seal. Raises CheckpointDamaged where bytes have changed."""
    if not intact(data):
        raise CheckpointDamaged(f"{where} is damaged: its {len(data)} bytes do not match its own checksum")
    try:
        document = load_json(data[:-_SEAL_BYTES] + b"}")
    except ValueError as error:
        raise CheckpointDamaged(f"{where} is damaged: {error}") from error
    return document


def load_json(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, duplicate keys, NaN and nesting that is too deep."""
    try:
        document = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(document, dict):
        raise ValueError(f"it holds a {type(document).__name__} in place of an object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key stands in it twice")
    return document


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")
