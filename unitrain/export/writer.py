"""Writes an exported folder: safetensors some rows at a time, and the folder only when it is whole."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoint.container import ELEMENT_TYPES, header_bytes
from ..errors import UnitrainError, UserError
from .pieces import Plan, Tensor

METADATA = {"format": "pt"}  # transformers and peft ask for it


class File(NamedTuple):
    """One file and the tensors in it."""

    name: str
    tensors: Sequence[Tensor]


def write_folder(plan: Plan, to: Path, max_shard_bytes: int) -> list[Path]:
    """Write all of a plan into a new folder, or an empty one; the files written.

    They lie under another name until all are on disk: `to` holds the whole export or nothing. Raises UserError where
    it holds something already, UnitrainError where the disk fails.
    """
    refuse_taken(to)
    draft = to.with_name(f".{to.name}.{secrets.token_hex(4)}")
    try:
        try:
            draft.mkdir(parents=True)
            _fill(draft, plan, max_shard_bytes)
            os.rename(draft, to)  # also over an empty folder
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    except OSError as error:
        raise UnitrainError(f"{to} could not be written: {error.strerror or error}") from error
    return sorted(to.iterdir())


def refuse_taken(to: Path) -> None:
    """Raise UserError where the folder holds something already."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        what = "is not empty" if to.is_dir() else "is a file"
        raise UserError(f"{to} {what}; name a new folder, nothing is overwritten")


def shards_of(tensors: Sequence[Tensor], stem: str, max_shard_bytes: int) -> list[File]:
    """Tensors in files of at most so many bytes, in their order; one that is larger has a file of its own."""
    groups: list[list[Tensor]] = []
    room = -1
    for tensor in tensors:
        if tensor.num_bytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= tensor.num_bytes
    if len(groups) <= 1:
        return [File(f"{stem}.safetensors", tensors)]
    return [
        File(f"{stem}-{number:05}-of-{len(groups):05}.safetensors", group) for number, group in enumerate(groups, 1)
    ]


def _fill(folder: Path, plan: Plan, max_shard_bytes: int) -> None:
    files = shards_of(plan.tensors, plan.stem, max_shard_bytes)
    for file in files:
        _write_tensors(folder / file.name, file.tensors)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in plan.tensors)},
            "weight_map": {tensor.name: file.name for file in files for tensor in file.tensors},
        }
        _write(folder / f"{plan.stem}.safetensors.index.json", json.dumps(index, indent=2).encode())
    for source in plan.copies:
        _write(folder / source.name, source.read_bytes())
    for name, content in plan.files.items():
        _write(folder / name, content)


def _write_tensors(path: Path, tensors: Sequence[Tensor]) -> None:
    with path.open("xb") as file:
        file.write(header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], METADATA))
        for tensor in tensors:
            for part in tensor.parts():
                assert part.dtype == ELEMENT_TYPES[tensor.dtype].numpy, "the plan converts what it reads"
                file.write(np.ascontiguousarray(part).data)
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
