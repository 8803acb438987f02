"""Hugging Face data sets on this machine as samples: folders of save_to_disk, parquet and JSON lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MissingExtra, RecipeError
from ..offline import go_offline
from ..recipe import at_least, key, one_of, required
from .arrays import SPLITS, check_eval_fraction, split_rows
from .files import TextFile, find_files
from .packing import CACHE, Piece, Tokens, tokens_of
from .source import Source
from .text import Documents, PackedText
from .tokenizer import BYTES, Tokenizer, open_tokenizer

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class DatasetsData:
    """`data: {name: datasets}`: texts of a column, with or without labels. Nothing is fetched from a network.

    Texts are turned into tokens once on each machine and kept below `cache`, mapped into memory from then on.
    """

    path: str | tuple[str, ...] = required(
        "a folder of save_to_disk, or .parquet, .jsonl or .json files, folders and globs of them"
    )
    split: str = key("train", "which part of a folder that holds several")
    eval_split: str | None = key(
        None, "the part for evaluation, of a folder that holds several; null: rows are held out"
    )
    eval_path: str | tuple[str, ...] | None = key(None, "data for evaluation; null: rows of `path` are held out")
    eval_fraction: float = key(0.1, "share of the rows of `path` held out for evaluation; 0: none")
    text: str = key("text", "column of texts")
    label: str | None = key(None, "column of whole numbers from 0: the samples are texts with a class")
    tokenizer: str = key(BYTES, "`bytes` (256 tokens, one a byte), or the path of a tokenizer.json or its folder")
    seq_len: int = key(128, "tokens of one sample")
    pack: bool = key(True, "samples are windows over all texts in a row; false: one text each, cut or padded")
    cache: str = key(CACHE, "folder for tokens")

    def __post_init__(self) -> None:
        if not all(_paths(self.path)) or not self.path:
            raise RecipeError(f"data.path is {self.path!r}; give a folder of save_to_disk or data files")
        at_least("data.seq_len", self.seq_len, 1)
        check_eval_fraction(self.eval_fraction)
        if self.eval_split is not None and self.eval_path is not None:
            raise RecipeError("data.eval_split and data.eval_path both say what to evaluate on; leave one of them out")

    def open(self, split: str) -> Source | None:
        """The texts of a split; None where nothing is held out.

        Raises RecipeError for paths and columns that are not there, DataError for what cannot be read.
        """
        one_of("split", split, SPLITS)
        own = self.eval_split is not None or self.eval_path is not None  # evaluation has data of its own
        if split == "eval" and not own and not self.eval_fraction:
            return None
        elsewhere = split == "eval" and own
        paths = _paths(self.eval_path if elsewhere and self.eval_path is not None else self.path)
        table = _Table(paths, self.eval_split if elsewhere and self.eval_split is not None else self.split)
        tokenizer = open_tokenizer(self.tokenizer)
        facts = [self.text, self.label, self.seq_len if self.label else 0, tokenizer.fingerprint, table.fingerprint()]
        tokens = tokens_of(_digest(facts), lambda: self._pieces(table, tokenizer), self.cache)
        held_out = 0.0 if own else self.eval_fraction
        options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "seq_len": self.seq_len,
            "name": f"{self.path}, {split}",
            "fingerprint": _digest([*facts, self.pack, self.seq_len, held_out, split]),
        }
        source = self._source(tokens, held_out, split, options)
        if not len(source):
            raise RecipeError(
                f"the {split} split of {self.path!r} holds {len(tokens.tokens)} tokens in {len(tokens.lengths)} texts, "
                "too few for one sample; lower data.seq_len or give more text"
            )
        return source

    def _source(self, tokens: Tokens, held_out: float, split: str, options: dict[str, Any]) -> Source:
        if tokens.labels is None and self.pack:
            return PackedText(_part(tokens, held_out, split), **options)
        rows = split_rows(len(tokens.lengths), held_out, split)
        if tokens.labels is None:
            return Documents(tokens.tokens, tokens.lengths, rows, **options)
        return LabelledTexts(tokens, rows, **options)

    def _pieces(self, table: _Table, tokenizer: Tokenizer) -> Iterator[Piece]:
        """The whole table, some rows at a time."""
        for texts, labels in table.columns(self.text, self.label):
            if labels is None:
                yield Piece(*tokenizer.join([text for text in texts if text]))
                continue
            rows = tokenizer.rows(texts, self.seq_len)
            lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
            yield Piece(np.concatenate(rows), lengths, labels)


class LabelledTexts(Source):
    """`tokens`, int64, and `mask`, uint8, (rows, seq_len): 1 on tokens and 0 on padding; `y`, int64 (rows,)."""

    def __init__(
        self,
        tokens: Tokens,
        chosen: NDArray[np.int64],
        *,
        tokenizer: Tokenizer,
        seq_len: int,
        name: str = "texts",
        fingerprint: str = "",
    ) -> None:
        assert tokens.labels is not None, "made of a labelled table"
        self.vocab_size, self.pad = tokenizer.vocab_size, tokenizer.pad
        self.num_classes = int(tokens.labels.max(initial=-1)) + 1
        self.seq_len = self.tokens_per_sample = seq_len
        self._tokens, self._labels = tokens.tokens, tokens.labels[chosen]
        self._lengths = tokens.lengths[chosen]
        self._starts = (np.cumsum(tokens.lengths) - tokens.lengths)[chosen]
        self._name, self._fingerprint = name, fingerprint

    def __len__(self) -> int:
        return len(self._labels)

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """`tokens`, `mask` and `y`."""
        places = np.arange(self.seq_len)
        inside = places < self._lengths[ids][:, None]
        found = self._tokens[np.where(inside, self._starts[ids][:, None] + places, 0)]
        window = np.where(inside, found, self.pad).astype(np.int64)
        return {"tokens": window, "mask": inside.astype(np.uint8), "y": self._labels[ids]}

    def fingerprint(self) -> str:
        """The data's files or its own fingerprint, the tokenizer, and how samples are cut."""
        return f"{type(self).__name__}:{len(self)}:{self._fingerprint}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name})"


class _Table:
    """Rows of named columns, read some at a time, wherever they lie."""

    def __init__(self, paths: tuple[str, ...], split: str) -> None:
        self.split = split
        self.folder = next((Path(path).expanduser() for path in paths if _is_saved(path)), None)
        if self.folder is not None and len(paths) > 1:
            raise RecipeError(
                f"data.path lists {str(self.folder)!r}, a folder of save_to_disk, among others; give it alone"
            )
        self.files: list[TextFile] = []
        if self.folder is None:
            found = find_files(paths, "**/*")
            self.files = [file for file in found if file.path.suffix in FORMATS]
            kinds = {FORMATS[file.path.suffix] for file in self.files}
            if len(kinds) != 1 or len(self.files) != len(found):
                raise RecipeError(
                    f"data.path names {', '.join(sorted({file.path.suffix or file.name for file in found}))} files; "
                    f"give files of one kind out of {', '.join(FORMATS)}, or a folder of save_to_disk"
                )
            self.format = kinds.pop()

    def fingerprint(self) -> list[Any]:
        """Names and sizes of the files that hold the rows."""
        if self.folder is None:
            return [(file.name, file.path.stat().st_size) for file in self.files]
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        named = [(str(path.relative_to(self.folder)), path) for path in files]
        states = [path.read_text(encoding="utf-8") for name, path in named if name.endswith("state.json")]
        return [self.split, states, [(name, path.stat().st_size) for name, path in named]]

    def columns(self, text: str, label: str | None) -> Iterator[tuple[list[bytes], NDArray[np.int64] | None]]:
        """Texts as UTF-8 and their labels, some rows at a time. Raises RecipeError for columns that are not there."""
        try:
            for rows in self._opened().iter(batch_size=_ROWS_AT_ONCE):
                for column in (text, label):
                    if column is not None and column not in rows:
                        raise RecipeError(f"the data has no column {column!r}; it has {', '.join(sorted(rows))}")
                texts = rows[text]
                if not all(isinstance(value, str) for value in texts):
                    raise RecipeError(f"column {text!r} does not hold texts alone; name the column in data.text")
                yield [value.encode() for value in texts], None if label is None else _labels(rows[label], label)
        except (RecipeError, DataError):
            raise
        except Exception as error:  # the package raises what its readers raise
            where = self.folder or ", ".join(str(file.path) for file in self.files[:4])
            raise DataError(f"{where} could not be read: {type(error).__name__}: {error}") from error

    def _opened(self) -> Any:
        go_offline()
        try:
            import datasets
        except ImportError as error:
            raise MissingExtra("data source 'datasets'", "datasets", "hf") from error
        if self.folder is None:
            names = [str(file.path) for file in self.files]
            # Streamed: otherwise all rows would be copied into another cache first.
            return datasets.load_dataset(self.format, data_files=names, split="train", streaming=True)
        found = datasets.load_from_disk(str(self.folder))
        if not isinstance(found, datasets.DatasetDict):
            return found
        if self.split not in found:
            raise RecipeError(
                f"{self.folder} has no split {self.split!r}; set data.split and data.eval_split to some of "
                f"{', '.join(found)}"
            )
        return found[self.split]


def _labels(values: list[Any], label: str) -> NDArray[np.int64]:
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise RecipeError(f"column {label!r} does not hold whole numbers from 0; number the classes first")
    return np.array(values, dtype=np.int64)


def _part(tokens: Tokens, held_out: float, split: str) -> NDArray[Any]:
    """The tokens of a split: whole texts, the last ones for evaluation."""
    if not held_out:
        return tokens.tokens
    ends = np.cumsum(tokens.lengths)
    wanted = round(len(tokens.tokens) * (1 - held_out))
    cut = int(ends[np.searchsorted(ends, wanted, side="right") - 1]) if len(ends) and ends[0] <= wanted else wanted
    return tokens.tokens[:cut] if split == "train" else tokens.tokens[cut:]


def _is_saved(path: str) -> bool:
    place = Path(path).expanduser()
    return (place / "dataset_dict.json").is_file() or (place / "state.json").is_file()


def _paths(path: str | tuple[str, ...]) -> tuple[str, ...]:
    return (path,) if isinstance(path, str) else tuple(path)


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
