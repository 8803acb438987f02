"""How text becomes token ids: its UTF-8 bytes, or a Hugging Face tokenizer.json, alone or in its folder."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import MissingExtra, RecipeError

BYTES = "bytes"
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # the first that a vocabulary has
_PADS = ("[PAD]", "<pad>", "<|pad|>")
_MASKS = ("[MASK]", "<mask>")
_DOCUMENTS_AT_ONCE = 256  # bounds the memory of one call; the tokenizer spreads them over threads


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int  # ids are 0 to vocab_size - 1
    fingerprint: str  # the same for the same vocabulary, wherever its file is
    pad: int = 0  # the id that fills rows up; it carries no weight
    mask: int | None = None  # the id that stands for a hidden token, where the vocabulary has one

    @abstractmethod
    def join(self, documents: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Tokens of all documents in one array, each followed by a separator, and how many each has with it."""

    @abstractmethod
    def rows(self, texts: Sequence[bytes], most: int) -> list[NDArray[Any]]:
        """Tokens of each text on its own, at most so many, with what the tokenizer puts around a single text."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids of a text, without a separator."""

    @abstractmethod
    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids; what is no text comes as replacement characters."""


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json or of its folder.

    Raises RecipeError without that file, MissingExtra without the package.
    """
    return ByteTokenizer() if name == BYTES else HuggingFaceTokenizer(name)


class ByteTokenizer(Tokenizer):
    """Every byte of UTF-8 is a token; documents are separated by a newline."""

    vocab_size = 256
    fingerprint = BYTES

    def join(self, documents: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Tokens as uint8, over the very bytes that were read."""
        tokens = np.frombuffer(b"\n".join([*documents, b""]), dtype=np.uint8)
        return tokens, np.fromiter((len(document) + 1 for document in documents), np.int64, len(documents))

    def rows(self, texts: Sequence[bytes], most: int) -> list[NDArray[Any]]:
        """The first bytes of each text."""
        return [np.frombuffer(text[:most], dtype=np.uint8) for text in texts]

    def encode(self, text: str) -> NDArray[np.int64]:
        """The bytes of the text."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """The bytes as UTF-8."""
        return np.asarray(ids).astype(np.uint8).tobytes().decode(errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json; documents are separated by its end-of-text token, or by a newline where it has none.

    In a folder, tokenizer_config.json beside it says which token ends a text.
    """

    def __init__(self, path: str) -> None:
        file = Path(path).expanduser()
        settings = _settings(file) if file.is_dir() else {}
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise RecipeError(
                f"data.tokenizer is {path!r}, where there is no file; give {BYTES!r} or the path of a tokenizer.json"
            )
        try:
            import tokenizers
        except ImportError as error:
            raise MissingExtra(f"tokenizer {path!r}", "tokenizers", "tokenizers") from error
        content = file.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises plain Exception
            raise RecipeError(f"{path} is no tokenizer.json that the package tokenizers can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Not get_vocab_size(): ids may have gaps.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        self._dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        end = self._first(_word(settings, "eos_token") + _ENDS_OF_TEXT)
        self._separator = self._ids("\n") if end is None else [end]
        self.pad = self._first(_word(settings, "pad_token") + _PADS) or 0
        self.mask = self._first(_word(settings, "mask_token") + _MASKS)

    def join(self, documents: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Tokens as uint16, or uint32 for a vocabulary above 65536."""
        parts = [
            np.array(ids + self._separator, dtype=self._dtype)
            for some in _batches(documents)
            for ids in self._ids_of_all([document.decode(errors="replace") for document in some])
        ]
        tokens = np.concatenate(parts) if parts else np.empty(0, self._dtype)
        return tokens, np.array([len(part) for part in parts], dtype=np.int64)

    def rows(self, texts: Sequence[bytes], most: int) -> list[NDArray[Any]]:
        """Tokens with the special ones, such as [CLS] and [SEP], which stay when a text is cut."""
        self._tokenizer.enable_truncation(most)
        try:
            found = self._tokenizer.encode_batch([text.decode(errors="replace") for text in texts])
        finally:
            self._tokenizer.no_truncation()
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in found]

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids without special tokens."""
        return np.array(self._ids(text), dtype=np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """The text, special tokens spelled out."""
        text: str = self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)
        return text

    def _first(self, words: Sequence[str]) -> int | None:
        """The id of the first of these words that the vocabulary has."""
        ids = (self._tokenizer.token_to_id(word) for word in words)
        return next((token for token in ids if token is not None), None)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _ids_of_all(self, texts: list[str]) -> Iterable[list[int]]:
        return (encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False))


def _settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, if there is one."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder / 'tokenizer_config.json'} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _word(settings: dict[str, Any], name: str) -> tuple[str, ...]:
    """A special token of the settings, which is text or an object with its content."""
    value = settings.get(name)
    word = value.get("content") if isinstance(value, dict) else value
    return (word,) if isinstance(word, str) else ()


def _batches(documents: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        yield documents[start : start + _DOCUMENTS_AT_ONCE]
