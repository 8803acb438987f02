"""Rows of text for language models that answer: prompts, completions, preferences, and what rewards need to know."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import registry
from ..errors import DataError, RecipeError
from ..recipe import at_least, key, one_of, required
from .arrays import SPLITS, check_eval_fraction, split_rows
from .files import find_files
from .source import Source
from .tokenizer import BYTES, Tokenizer, open_tokenizer

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RecordsData:
    """`data: {name: records}`: objects of JSON lines, or what a function of yours returns for a split."""

    path: str | tuple[str, ...] = required(
        "JSON lines files, folders and globs of them; or `module:function`, which takes `train` or `eval` and returns "
        "a list of mappings"
    )
    eval_path: str | tuple[str, ...] | None = key(None, "files for evaluation; null: rows of `path` are held out")
    eval_fraction: float = key(0.1, "share of the rows of `path` held out for evaluation; 0: none")
    prompt: str = key("prompt", "column of prompts")
    completion: str = key("completion", "column of completions, for SFT and KTO")
    chosen: str = key("chosen", "column of the better completion of a pair")
    rejected: str = key("rejected", "column of the worse one")
    label: str = key("label", "column of true for desirable completions, false for others (KTO)")
    end: str = key("\n", "what is put behind each completion; its last token ends a response in generation too")
    tokenizer: str = key(BYTES, "`bytes` (256 tokens, one a byte), or the path of a tokenizer.json or its folder")
    seq_len: int = key(128, "most tokens of prompt and completion; what is longer is cut")

    def __post_init__(self) -> None:
        at_least("data.seq_len", self.seq_len, 2)
        check_eval_fraction(self.eval_fraction)

    def open(self, split: str) -> Records | None:
        """The rows of a split; None where nothing is held out. Raises RecipeError, or DataError for damaged files."""
        one_of("split", split, SPLITS)
        rows = self._rows(split)
        return None if rows is None else Records(rows, self)

    def _rows(self, split: str) -> Sequence[Row] | None:
        path = self.path
        if isinstance(path, str) and ":" in path and not Path(path).exists():
            rows = registry.resolve(path)(split)
            if not all(isinstance(row, Mapping) for row in rows):
                raise DataError(f"{path} returned rows that are no mappings; return a list of mappings")
            return list(rows) or None
        if self.eval_path is not None:
            return _read(path if split == "train" else self.eval_path)
        rows = _read(path)
        if split == "eval" and not self.eval_fraction:
            return None
        return [rows[number] for number in split_rows(len(rows), self.eval_fraction, split)]


class Records(Source):
    """Rows of a split. As a source: prompts with completions, of which the completions are learnt (SFT).

    `tokens` and `targets` (rows, seq_len), int64, and `weight`, float32: 1 where the target belongs to a completion.
    """

    def __init__(self, rows: Sequence[Row], options: RecordsData) -> None:
        self.rows, self.options = rows, options
        self.tokenizer: Tokenizer = open_tokenizer(options.tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        self.seq_len = self.tokens_per_sample = options.seq_len - 1
        self._end = self.tokenizer.encode(options.end)
        self.stop: tuple[int, ...] = tuple(self._end[-1:].tolist())

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, number: int) -> NDArray[np.int64]:
        """Tokens of a row's prompt."""
        return self.tokenizer.encode(self._text(number, self.options.prompt))

    def columns(self, number: int) -> dict[str, Any]:
        """All that a row says, for rewards."""
        return dict(self.rows[number])

    def whole(self, prompt: int, number: int, column: str) -> tuple[NDArray[np.int64], int]:
        """Tokens of a prompt and of another row's (or its own) completion, cut; and how many are the prompt's."""
        before = self.prompt(prompt)
        after = np.concatenate((self.tokenizer.encode(self._text(number, column)), self._end))
        return np.concatenate((before, after))[: self.options.seq_len], min(len(before), self.options.seq_len)

    def rows_of(self, wholes: Sequence[tuple[NDArray[np.int64], int]]) -> dict[str, NDArray[Any]]:
        """Padded `tokens`, `targets` and `weight`."""
        shape = (len(wholes), self.options.seq_len)
        tokens, weight = np.full(shape, self.tokenizer.pad, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        for row, (whole, prompt) in enumerate(wholes):
            tokens[row, : len(whole)] = whole
            weight[row, prompt : len(whole)] = 1
        return {"tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy(), "weight": weight[:, 1:].copy()}

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """`tokens`, `targets` and `weight`."""
        return self.rows_of([self.whole(number, number, self.options.completion) for number in ids.tolist()])

    def decode(self, ids: Any) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids)

    def fingerprint(self) -> str:
        """Of all rows, the tokenizer, and how rows are cut."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        facts = [list(map(dict, self.rows)), self.tokenizer.fingerprint, self.options.seq_len, self.options.end]
        digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
        return f"{type(self).__name__}:{len(self)}:{digest[:32]}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.options.path})"

    def _text(self, number: int, column: str) -> str:
        row = self.rows[number]
        if not isinstance(row.get(column), str):
            raise DataError(
                f"row {number} of {self!r} has no text {column!r}; it has {', '.join(map(str, row))}: name columns in "
                "data.prompt, data.completion, data.chosen, data.rejected"
            )
        text: str = row[column]
        return text


class View(Source):
    """Another way to look at records."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.vocab_size, self.tokens_per_sample = records.vocab_size, records.tokens_per_sample

    def __len__(self) -> int:
        return len(self.records)

    def fingerprint(self) -> str:
        """The records' own."""
        return self.records.fingerprint()

    def __repr__(self) -> str:
        return repr(self.records)


class Prompts(View):
    """`row` (rows,), int64: who trains on prompts asks the records themselves."""

    def __init__(self, records: Records) -> None:
        super().__init__(records)
        self.tokens_per_sample = 0

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """`row`."""
        return {"row": ids}


class Pairs(View):
    """`tokens`, `targets` and `weight` of (rows, 2, seq_len): the chosen completion, then the rejected one."""

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """`tokens`, `targets` and `weight`."""
        records, options = self.records, self.records.options
        columns = (options.chosen, options.rejected)
        found = records.rows_of([records.whole(row, row, column) for row in ids.tolist() for column in columns])
        return {name: array.reshape(len(ids), 2, -1) for name, array in found.items()}


class Labelled(View):
    """As `Pairs`, of a prompt with its own completion and with that of the next row (for KTO's KL); `label`, bool."""

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """`tokens`, `targets`, `weight` and `label`."""
        records, column = self.records, self.records.options.completion
        wholes = []
        for row in ids.tolist():
            wholes += [records.whole(row, row, column), records.whole(row, (row + 1) % len(records), column)]
        found = {name: array.reshape(len(ids), 2, -1) for name, array in records.rows_of(wholes).items()}
        labels = [records.rows[row].get(records.options.label) for row in ids.tolist()]
        if not all(isinstance(label, bool | int) for label in labels):
            raise DataError(f"{records!r} has rows without {records.options.label!r}; name it in data.label")
        return {**found, "label": np.array(labels, dtype=bool)}


def _read(paths: str | Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for file in find_files([paths] if isinstance(paths, str) else paths, "**/*.jsonl"):
        for number, line in enumerate(file.read().decode(errors="replace").splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file.path}:{number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{file.path}:{number} is no object of JSON; give one a line")
            rows.append(row)
    if not rows:
        raise RecipeError(f"data.path {paths!r} holds no rows; give JSON lines")
    return rows
