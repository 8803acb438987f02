"""Checkpoints that another library writes file by file: which of them are whole, and which may go.

A folder counts once `unitrain.json` lies in it, which is written last and holds the size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError

SEAL = "unitrain.json"
_NAME = re.compile(r"checkpoint-(\d{1,12})")
_READ_BYTES = 1 << 20


class Sealed(NamedTuple):
    """A whole checkpoint."""

    path: Path
    step: int
    facts: Mapping[str, Any]


def place(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"checkpoint-{step}"


def seal(folder: Path, step: int, facts: Mapping[str, Any]) -> int:
    """Make a folder that is complete count, once its bytes will outlive a power cut; how many they are.

    Raises CheckpointError where the disk does not take it.
    """
    try:
        files = {name: _durable(folder / name) for name in _files(folder)}
        text = json.dumps({"step": step, "facts": dict(facts), "files": files}, indent=1)
        draft = folder / f".{SEAL}.tmp"
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / SEAL)
        for path in (folder, folder.parent):
            _sync(path)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {folder} could not be sealed: {error.strerror}") from error
    return sum(size for size, _ in files.values())


def newest(root: Path) -> tuple[Sealed | None, list[tuple[Path, str]]]:
    """The sealed checkpoint of the latest step whose files are all as they were; and what was damaged after it."""
    damaged: list[tuple[Path, str]] = []
    for step in sorted(_steps(root), reverse=True):
        folder = place(root, step)
        if not (folder / SEAL).is_file():
            continue  # nobody finished it
        try:
            return _read(folder, step), damaged
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append((folder, str(error)))
    return None, damaged


def clear(root: Path, *, keep: int, newest: int) -> None:
    """Delete what is older than the `keep` newest, and every folder below that nobody finished."""
    sealed = sorted(step for step in _steps(root) if (place(root, step) / SEAL).is_file() and step <= newest)
    for step in _steps(root):
        whole = (place(root, step) / SEAL).is_file()
        if step in sealed[:-keep] or (not whole and step < newest):
            (place(root, step) / SEAL).unlink(missing_ok=True)  # first: half a folder must not count
            shutil.rmtree(place(root, step), ignore_errors=True)


def _read(folder: Path, step: int) -> Sealed:
    found = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    if found["step"] != step:
        raise ValueError(f"{SEAL} is of step {found['step']}")
    for name, (size, digest) in found["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{name} is not there or has another size")
        if _digest(path) != digest:
            raise ValueError(f"{name} has other contents")
    if not isinstance(found["facts"], dict):
        raise ValueError(f"{SEAL} has no facts")
    return Sealed(folder, step, found["facts"])


def _steps(root: Path) -> list[int]:
    names = [_NAME.fullmatch(path.name) for path in root.glob("checkpoint-*") if path.is_dir()]
    return [int(name[1]) for name in names if name is not None]


def _files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")
    )


def _durable(path: Path) -> tuple[int, str]:
    digest = _digest(path)
    _sync(path)
    return path.stat().st_size, digest


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            found.update(part)
    return found.hexdigest()


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
