"""Text files as samples for language models: windows of one long text, or one document a sample."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import RecipeError
from ..recipe import at_least, key, one_of, required
from .arrays import SPLITS, check_eval_fraction
from .files import PYTHON_STDLIB, TextFile, find_files, split_files
from .source import Source
from .tokenizer import BYTES, Tokenizer, open_tokenizer
from .windows import next_token, num_windows, windows


@dataclass(frozen=True, kw_only=True)
class TextData:
    """`data: {name: text}`: plain text.

    Train and eval are split by file, by a hash of the name; a single file by position, its last part for eval.
    """

    path: str | tuple[str, ...] = required(
        "a file, a folder, a glob, `python-stdlib` (12 MB of source code that every Python has), or a list of these"
    )
    eval_path: str | tuple[str, ...] | None = key(None, "files for evaluation; null: files of `path` are held out")
    eval_fraction: float = key(0.1, "share of `path` held out for evaluation; 0: none")
    pattern: str = key("**/*", "which files of a folder, as a glob below it")
    tokenizer: str = key(
        BYTES, "`bytes` (256 tokens, one a byte), or the path of a Hugging Face tokenizer.json or its folder"
    )
    seq_len: int = key(128, "tokens of one sample")
    lines: bool = key(False, "each line is a document; false: each file is")
    pack: bool = key(True, "samples are windows over all documents in a row; false: one document each, cut or padded")

    def __post_init__(self) -> None:
        if not all(_paths(self.path)) or not self.path:
            raise RecipeError(f"data.path is {self.path!r}; give a file, a folder, a glob or {PYTHON_STDLIB!r}")
        at_least("data.seq_len", self.seq_len, 1)
        check_eval_fraction(self.eval_fraction)

    def open(self, split: str) -> TextSource | None:
        """The text of a split; None where nothing is held out.

        Raises RecipeError for paths without files and for a text that is too short, DataError for unreadable files.
        """
        one_of("split", split, SPLITS)
        if split == "eval" and self.eval_path is None and not self.eval_fraction:
            return None
        files, contents = self._contents(split)
        documents = [line for content in contents for line in content.splitlines()] if self.lines else contents
        tokenizer = open_tokenizer(self.tokenizer)
        tokens, lengths = tokenizer.join([document for document in documents if document])
        facts = [self.seq_len, self.pack, self.lines, self.eval_fraction, self.eval_path is None, split]
        sizes = [(file.name, len(content)) for file, content in zip(files, contents, strict=True)]
        digest = hashlib.sha256(json.dumps([tokenizer.fingerprint, facts, sizes]).encode()).hexdigest()[:16]
        options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "seq_len": self.seq_len,
            "name": f"{self.path}, {split}",
            "fingerprint": digest,
        }
        source = PackedText(tokens, **options) if self.pack else Documents(tokens, lengths, **options)
        if not len(source):
            raise RecipeError(
                f"the {split} split of {self.path!r} holds {len(tokens)} tokens, but one sample "
                f"takes {self.seq_len + 1}; lower data.seq_len, or "
                + ("give more text" if split == "train" else "set data.eval_fraction: 0")
            )
        return source

    def _contents(self, split: str) -> tuple[list[TextFile], list[bytes]]:
        """The files of a split and what of each belongs to it."""
        chosen = self.path if split == "train" or self.eval_path is None else self.eval_path
        files = find_files(_paths(chosen), self.pattern)
        if self.eval_path is not None or not self.eval_fraction:
            return files, [file.read() for file in files]
        if len(files) > 1:
            files = split_files(files, self.eval_fraction, split)
            return files, [file.read() for file in files]
        content = files[0].read()
        cut = _cut(content, self.eval_fraction)
        return files, [content[:cut] if split == "train" else content[cut:]]


class TextSource(Source):
    """`tokens` and `targets`, int64 (rows, seq_len): targets[:, i] is the token after tokens[:, i]."""

    def __init__(
        self,
        tokens: NDArray[Any],
        *,
        tokenizer: Tokenizer,
        seq_len: int,
        name: str = "text",
        fingerprint: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.seq_len = self.tokens_per_sample = seq_len
        self._tokens = tokens  # in the smallest type that holds them
        self._name = name
        self._fingerprint = fingerprint

    @abstractmethod
    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """`tokens` and `targets`."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids of a text."""
        return self.tokenizer.encode(text)

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids)

    def fingerprint(self) -> str:
        """Names and sizes of the files, the tokenizer, and how samples are cut."""
        return f"{type(self).__name__}:{len(self)}:{self._fingerprint}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name})"


class PackedText(TextSource):
    """Consecutive windows over all documents in a row; neighbours share the one token between them."""

    def __len__(self) -> int:
        return num_windows(len(self._tokens), self.seq_len)

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """`tokens` and `targets`."""
        return windows(self._tokens, ids * self.seq_len, self.seq_len)


class Documents(TextSource):
    """One document a sample, cut or padded to seq_len; `weight`, float32 (rows, seq_len), is 0 on padding.

    `chosen`: numbers of the documents that are samples; None: all.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[np.int64],
        chosen: NDArray[np.int64] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(tokens, **options)
        chosen = np.arange(len(lengths)) if chosen is None else chosen
        chosen = chosen[lengths[chosen] > 1]  # a document of a separator alone has nothing to predict
        self._lengths = lengths[chosen]
        self._starts = (np.cumsum(lengths) - lengths)[chosen]

    def __len__(self) -> int:
        return len(self._lengths)

    def fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """`tokens`, `targets` and `weight`."""
        places = np.arange(self.seq_len + 1)
        inside = places < self._lengths[ids][:, None]
        found = self._tokens[np.where(inside, self._starts[ids][:, None] + places, 0)]
        window = np.where(inside, found, 0).astype(np.int64)
        return {**next_token(window), "weight": inside[:, 1:].astype(np.float32)}


def _paths(path: str | tuple[str, ...]) -> tuple[str, ...]:
    return (path,) if isinstance(path, str) else tuple(path)


def _cut(content: bytes, eval_fraction: float) -> int:
    """Where the eval part of a single file begins: after a line where there is one before that place."""
    place = round(len(content) * (1 - eval_fraction))
    return content.rfind(b"\n", 0, place) + 1 or place
