"""Token files that are mapped into memory, never read as a whole: nanoGPT's .bin and Megatron-LM's .bin with .idx."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, RecipeError
from ..recipe import at_least, key, one_of, required
from .arrays import SPLITS, check_eval_fraction
from .source import Source
from .windows import num_windows, windows

DTYPES = ("auto", "uint8", "uint16", "uint32", "int32", "int64")

# Head of a Megatron-LM index (megatron/core/datasets/indexed_dataset.py): magic, version, dtype, sequences, documents.
# Behind it: int32 length and int64 byte offset of each sequence, int64 first sequence of each document.
_INDEX_HEAD = struct.Struct("<9sQBQQ")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


@dataclass(frozen=True, kw_only=True)
class TokensData:
    """`data: {name: tokens}`: token ids in a flat file, one after the other, little endian.

    nanoGPT writes such a .bin; Megatron-LM writes one with an .idx beside it, which tells the dtype. Samples are
    consecutive windows and run across documents.
    """

    path: str = required("a .bin file, with or without its suffix, or a folder with train.bin and perhaps val.bin")
    eval_path: str | None = key(None, "a .bin file for evaluation; null: the folder's val.bin, or the end of `path`")
    eval_fraction: float = key(0.0, "share of `path` held out at its end where there is no eval file; 0: none")
    dtype: str = key("auto", "`uint8`, `uint16`, `uint32`, `int32`, `int64`; auto: of the .idx file, or uint16")
    seq_len: int = key(1024, "tokens of one sample")
    vocab_size: int | None = key(None, "ids are below this; null: as many as a uint8 or uint16 can tell apart")

    def __post_init__(self) -> None:
        one_of("data.dtype", self.dtype, DTYPES)
        at_least("data.seq_len", self.seq_len, 1)
        check_eval_fraction(self.eval_fraction)
        if self.vocab_size is not None:
            at_least("data.vocab_size", self.vocab_size, 1)

    def open(self, split: str) -> TokensSource | None:
        """The tokens of a split; None where nothing is held out. Reads no token.

        Raises RecipeError for absent files, contradictions and a text that is too short, DataError for damaged files.
        """
        one_of("split", split, SPLITS)
        train, held_out = self._files()
        whole = held_out is not None or not self.eval_fraction
        if split == "eval" and whole:
            return None if held_out is None else self._source(held_out, 0.0, 1.0)
        if whole:
            return self._source(train, 0.0, 1.0)
        cut = 1 - self.eval_fraction
        return self._source(train, 0.0, cut) if split == "train" else self._source(train, cut, 1.0)

    def _files(self) -> tuple[Path, Path | None]:
        """The train file, and the eval file if there is one."""
        place = Path(self.path).expanduser()
        folder = place.is_dir()
        train = _token_file("data.path", place / "train.bin" if folder else place)
        if self.eval_path is not None:
            return train, _token_file("data.eval_path", Path(self.eval_path).expanduser())
        val = place / "val.bin"
        return train, val if folder and val.is_file() else None

    def _source(self, file: Path, begin: float, end: float) -> TokensSource:
        tokens = _map(file, self.dtype)
        tokens = tokens[round(len(tokens) * begin) : round(len(tokens) * end)]
        if not num_windows(len(tokens), self.seq_len):
            raise RecipeError(
                f"{file} holds {len(tokens)} tokens for this split, but one sample takes {self.seq_len + 1}; "
                "lower data.seq_len or give more tokens"
            )
        return TokensSource(
            tokens, seq_len=self.seq_len, vocab_size=self.vocab_size or _num_values(file, tokens.dtype), name=str(file)
        )


class TokensSource(Source):
    """`tokens` and `targets`, int64 (rows, seq_len): targets[:, i] is the token after tokens[:, i]."""

    def __init__(self, tokens: NDArray[Any], *, seq_len: int, vocab_size: int, name: str = "tokens") -> None:
        self.vocab_size = vocab_size
        self.seq_len = self.tokens_per_sample = seq_len
        self._tokens = tokens
        self._name = name

    def __len__(self) -> int:
        return num_windows(len(self._tokens), self.seq_len)

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """`tokens` and `targets`. Raises DataError naming the sample for an id outside the vocabulary."""
        found = windows(self._tokens, ids * self.seq_len, self.seq_len)
        for array in found.values():
            outside = (array < 0) | (array >= self.vocab_size)
            if outside.any():
                row, place = np.argwhere(outside)[0]
                raise DataError(
                    f"sample {ids[row]} of {self!r} holds token {array[row, place]}, but the vocabulary ends at "
                    f"{self.vocab_size - 1}; correct data.vocab_size or data.dtype ({self._tokens.dtype} now)"
                )
        return found

    def fingerprint(self) -> str:
        """Name of the file, number and type of its tokens, length of a sample."""
        return f"TokensSource:{Path(self._name).name}:{len(self._tokens)}:{self._tokens.dtype}:{self.seq_len}"

    def __repr__(self) -> str:
        return f"TokensSource({self._name})"


def _token_file(where: str, place: Path) -> Path:
    """The .bin file of a path that may lack the suffix, as Megatron-LM writes prefixes."""
    file = place if place.suffix == ".bin" else place.with_name(place.name.removesuffix(".idx") + ".bin")
    for found in (file, place):
        if found.is_file() and found.suffix != ".idx":
            return found
    raise RecipeError(f"{where} leads to {str(file)!r}, where there is no file; give a .bin file of token ids")


def _map(file: Path, asked: str) -> NDArray[Any]:
    """All tokens of a file, mapped."""
    size = file.stat().st_size
    index = file.with_suffix(".idx")
    dtype = _index_dtype(index, file, size) if index.is_file() else "uint16" if asked == "auto" else asked
    if asked not in ("auto", dtype):
        raise RecipeError(f"data.dtype is {asked!r}, but {index} says {dtype}; leave data.dtype out")
    kind = np.dtype(dtype).newbyteorder("<")
    if size % kind.itemsize:
        raise DataError(
            f"{file} has {size} bytes, which is no whole number of {dtype} tokens; "
            "it is cut short, or data.dtype is another"
        )
    if not size:
        raise DataError(f"{file} is empty; write the tokens again")
    try:
        return np.memmap(file, dtype=kind, mode="r")
    except OSError as error:
        raise DataError(f"{file} could not be mapped into memory: {error.strerror}") from error


def _index_dtype(index: Path, file: Path, size: int) -> str:
    """The dtype of a Megatron-LM file, once its index has proved to belong to it. Reads the ends of the index only."""
    try:
        with index.open("rb") as stream:
            head = stream.read(_INDEX_HEAD.size)
            if len(head) < _INDEX_HEAD.size or not head.startswith(_INDEX_MAGIC):
                raise DataError(f"{index} is no Megatron-LM index; remove it if {file.name} is a plain token file")
            _, version, code, sequences, documents = _INDEX_HEAD.unpack(head)
            if version != 1 or code not in _INDEX_DTYPES:
                raise DataError(
                    f"{index} has version {version} and dtype code {code}; only version 1 with whole numbers is known"
                )
            lengths_end = _INDEX_HEAD.size + 4 * sequences
            if index.stat().st_size < lengths_end + 8 * sequences + 8 * documents:
                raise DataError(f"{index} is cut short: it names {sequences} sequences; copy it again")
            promised = 0
            if sequences:
                stream.seek(lengths_end - 4)
                (length,) = struct.unpack("<i", stream.read(4))
                stream.seek(lengths_end + 8 * (sequences - 1))
                (offset,) = struct.unpack("<q", stream.read(8))
                promised = offset + length * np.dtype(_INDEX_DTYPES[code]).itemsize
    except OSError as error:
        raise DataError(f"{index} could not be read: {error.strerror}") from error
    if promised != size:
        raise DataError(f"{index} promises {promised} bytes, but {file} has {size}; one of them belongs to another run")
    return _INDEX_DTYPES[code]


def _num_values(file: Path, dtype: np.dtype[Any]) -> int:
    """How many ids a small type can tell apart; a wide one needs the vocabulary's size."""
    if dtype.kind == "u" and dtype.itemsize <= 2:
        return 1 << (8 * dtype.itemsize)
    raise RecipeError(f"{file} holds {dtype} tokens, which do not tell how many there are; set data.vocab_size")
