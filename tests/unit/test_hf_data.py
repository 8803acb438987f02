"""Hugging Face data sets as samples: packing and padding by hand, splits, formats, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unitrain.data.hf import DatasetsData
from unitrain.data.packing import Piece, tokens_of
from unitrain.errors import DataError, RecipeError

datasets = pytest.importorskip("datasets")

TEXTS = ["abc", "de", "", "fghij", "k"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "y": len(text) % 3}) + "\n" for text in TEXTS))
    return path


def opened(path: Any, split: str = "train", **options: Any) -> Any:
    place = path[0] if isinstance(path, tuple) else path
    keys = {"eval_fraction": 0, "seq_len": 4, "cache": str(Path(place).parent / "cache")} | options
    return DatasetsData(path=path if isinstance(path, tuple) else str(path), **keys).open(split)


def texts(window: Any) -> list[str]:
    return [bytes(row.tolist()).decode() for row in window]


def test_packed_samples_are_windows_over_all_texts_and_their_separators(rows: Path) -> None:
    source = opened(rows)
    found = source.fetch(np.arange(len(source)))
    assert texts(found["tokens"]) == ["abc\n", "de\nf", "ghij"]
    assert texts(found["targets"]) == ["bc\nd", "e\nfg", "hij\n"]
    assert "weight" not in found  # each target counts


def test_padded_samples_are_one_text_each_and_padding_weighs_nothing(rows: Path) -> None:
    source = opened(rows, pack=False)
    found = source.fetch(np.arange(len(source)))
    assert texts(found["tokens"]) == ["abc\n", "de\n\0", "fghi", "k\n\0\0"]
    assert texts(found["targets"]) == ["bc\n\0", "e\n\0\0", "ghij", "\n\0\0\0"]
    assert found["weight"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_labelled_samples_have_a_mask_and_a_class(rows: Path) -> None:
    source = opened(rows, label="y")
    assert (source.num_classes, source.vocab_size, len(source)) == (3, 256, 5)
    found = source.fetch(np.array([3, 1, 2]))
    assert texts(found["tokens"]) == ["fghi", "de\0\0", "\0\0\0\0"]
    assert found["mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert found["y"].tolist() == [2, 2, 0]


def test_every_format_gives_the_same_samples(rows: Path, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(tmp_path / "several")
    wanted = opened(rows).fetch(np.arange(3))["tokens"]
    for name in ("rows.parquet", "one", "several"):
        assert np.array_equal(opened(tmp_path / name).fetch(np.arange(3))["tokens"], wanted), name
    test = opened(tmp_path / "several", "eval", eval_split="test")
    assert texts(test.fetch(np.arange(len(test)))["tokens"]) == ["abc\n"]


def test_train_and_eval_share_no_text(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number:03}", "y": 0}) + "\n" for number in range(50)))
    for options in ({"pack": False}, {"label": "y"}, {"seq_len": 3}):
        seen = {}
        for split in ("train", "eval"):
            source = opened(path, split, eval_fraction=0.2, **options)
            tokens = source.fetch(np.arange(len(source)))["tokens"]
            seen[split] = {text[:3] for text in texts(tokens) if text[:3].isdigit()}
        assert seen["train"] and seen["eval"] and not seen["train"] & seen["eval"], options


def test_tokens_are_mapped_and_made_once(rows: Path, tmp_path: Path) -> None:
    source = opened(rows)
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    before = (folder / "tokens").stat().st_mtime_ns
    assert opened(rows).fingerprint() == source.fingerprint()
    assert (folder / "tokens").stat().st_mtime_ns == before
    tokens = tokens_of(folder.name, lambda: iter(()), str(tmp_path / "cache")).tokens
    assert isinstance(tokens, np.memmap)
    rows.write_text(rows.read_text() + json.dumps({"text": "more", "y": 0}) + "\n")
    assert opened(rows).fingerprint() != source.fingerprint()


def test_tokens_that_could_not_be_made_leave_nothing_behind(tmp_path: Path) -> None:
    def failing() -> Any:
        yield Piece(np.zeros(3, np.uint8), np.array([3]))
        raise RecipeError("in the middle")

    with pytest.raises(RecipeError, match="in the middle"):
        tokens_of("key", failing, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "words"}, "the data has no column 'words'; it has text, y"),
        ({"label": "class"}, "the data has no column 'class'"),
        ({"label": "text"}, "column 'text' does not hold whole numbers from 0"),
        ({"text": "y"}, "column 'y' does not hold texts alone"),
        ({"seq_len": 100}, "too few for one sample; lower data.seq_len"),
        ({"tokenizer": "gone"}, "data.tokenizer is 'gone', where there is no file"),
        ({"eval_split": "test", "eval_path": "x"}, "leave one of them out"),
    ],
)
def test_what_cannot_be_read_is_refused(rows: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        opened(rows, **options)


def test_a_hub_name_is_no_path(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(RecipeError, match=r"'org/data', which is no file, folder or glob"):
        DatasetsData(path="org/data").open("train")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RecipeError, match=r"\.txt files; give files of one kind out of \.parquet"):
        opened(tmp_path / "notes.txt")


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "several")
    with pytest.raises(RecipeError, match=r"has no split 'train'; .* some of test"):
        opened(tmp_path / "several")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"rows\.parquet could not be read"):
        opened(tmp_path / "rows.parquet")
