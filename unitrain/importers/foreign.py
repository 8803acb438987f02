"""How another tool's configuration file becomes plain values: nothing in it is run, looked up or guessed.

YAML is read under the limits of recipes; JSON without duplicate keys, NaN or deep nesting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.strict import load_json
from ..errors import RecipeError
from ..yaml_text import MAX_BYTES, MAX_DEPTH, read_group

NO = ("", "none", "no", "false", "null")  # what these tools write for "not set", quoted or not


@dataclass
class Imported:
    """A recipe's groups as far as a foreign file tells them, and what remains to be said."""

    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was changed on the way, and what to look at
    unknown: dict[str, Any] = field(default_factory=dict)  # dotted key -> value: not understood, left out

    def put(self, key: str, value: Any) -> None:
        """Set a dotted key of the recipe."""
        *groups, last = key.split(".")
        place = self.recipe
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value

    def leave(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """List what stands in these values as not understood."""
        for key, value in values.items():
            self.unknown[f"{prefix}.{key}" if prefix else key] = value


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a .json or YAML file. Raises RecipeError with the file, and the line where it is known."""
    path = Path(path)
    text = _text(path)
    if not text.strip():
        raise RecipeError(f"{path} is empty; there is nothing to read")
    if path.suffix != ".json":
        return read_group(text, str(path))[0]
    try:
        values = load_json(text.encode())
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # half a character, or 1e999
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not JSON that can be used: {error}") from error
    if _depth(values) > MAX_DEPTH:
        raise RecipeError(f"{path}: groups are nested deeper than {MAX_DEPTH}")
    return values


def group(values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Take a group of keys out of the values; empty where there is none. Raises RecipeError for anything else."""
    found = values.pop(key, None)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RecipeError(f"{where}: {key} is {found!r}; it must be a group of keys")
    return found


def is_set(value: Any) -> bool:
    """False for null, false, and the words that stand for them; true for anything else."""
    return not (value is None or value is False or (isinstance(value, str) and value.strip().lower() in NO))


def truth(value: Any) -> bool | None:
    """true and false, quoted or not; None where it is neither."""
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else value
    return {"true": True, "yes": True, "false": False, "no": False}.get(word) if isinstance(word, str) else None


def whole(value: Any) -> int | None:
    """A whole number, quoted or not; None where it is none."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 10:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number(value: Any) -> float | None:
    """A finite number, quoted or not; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _depth(value: Any) -> int:
    """How deep groups and lists are nested."""
    deepest, open_ = 0, [(value, 1)]
    while open_:
        inner, depth = open_.pop()
        if isinstance(inner, dict | list):
            deepest = max(deepest, depth)
            open_ += [(item, depth + 1) for item in (inner.values() if isinstance(inner, dict) else inner)]
    return deepest


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{str(path)!r} cannot be read: {error.strerror}; give a configuration file") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES >> 20} MiB; this is no configuration file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text; save it as UTF-8") from error
