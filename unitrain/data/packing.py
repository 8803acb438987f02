"""Tokens of a data set in flat files, made once on a machine and mapped into memory from then on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

CACHE = "~/.cache/unitrain/tokens"


class Piece(NamedTuple):
    """Some documents, one after the other."""

    tokens: NDArray[Any]  # of all of them, always of one dtype
    lengths: NDArray[np.int64]  # of each
    labels: NDArray[np.int64] | None = None  # of each, where there are any


class Tokens(NamedTuple):
    """All documents of a data set, mapped."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64] | None


def tokens_of(key: str, pieces: Callable[[], Iterable[Piece]], cache: str = CACHE) -> Tokens:
    """The files that `key` stands for below `cache`; made of the pieces, one at a time, where they are not there.

    Of several ranks on a machine one makes them while the others wait. Raises DataError where they cannot be written.
    """
    root = Path(cache).expanduser()
    folder = root / key
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            with _alone(root / f"{key}.lock"):
                if not folder.is_dir():
                    _make(folder, pieces())
        return _mapped(folder)
    except OSError as error:
        raise DataError(
            f"tokens could not be kept in {root}: {error.strerror or error}; set data.cache to a folder with room"
        ) from error


def _make(folder: Path, pieces: Iterable[Piece]) -> None:
    """Write the files under another name, and rename the folder once they are whole."""
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        dtype, labelled = "uint8", False
        with (
            (draft / "tokens").open("wb") as tokens,
            (draft / "lengths").open("wb") as lengths,
            (draft / "labels").open("wb") as labels,
        ):
            for piece in pieces:
                dtype = piece.tokens.dtype.name
                tokens.write(piece.tokens.data)
                lengths.write(piece.lengths.astype(np.int64).data)
                if piece.labels is not None:
                    labelled = True
                    labels.write(piece.labels.astype(np.int64).data)
            _sync(tokens, lengths, labels)
        (draft / "about.json").write_text(json.dumps({"dtype": dtype, "labelled": labelled}), encoding="utf-8")
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _mapped(folder: Path) -> Tokens:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    labels = _map(folder / "labels", "int64") if about["labelled"] else None
    return Tokens(_map(folder / "tokens", about["dtype"]), _map(folder / "lengths", "int64"), labels)


def _map(file: Path, dtype: str) -> NDArray[Any]:
    """A file as an array; numpy cannot map an empty one."""
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype=dtype)


def _sync(*files: IO[bytes]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that the system drops if this process dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
