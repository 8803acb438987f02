"""Text as windows and as documents: what is held out, how it is cut, and what is said when a path is wrong."""

from __future__ import annotations

import dataclasses
import sys
import time

import numpy as np
import pytest

from unitrain.data.files import PYTHON_STDLIB, find_files, split_files
from unitrain.data.text import TextData
from unitrain.errors import DataError, MissingExtra, RecipeError

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path):
    """Forty files in two folders, with a hidden one and a hidden folder beside them."""
    for number in range(40):
        file = tmp_path / "texts" / ("deep" if number % 2 else "") / f"{number:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"file {number:02}\n" * 5)
    (tmp_path / "texts" / ".hidden").write_text("hidden")
    (tmp_path / "texts" / ".git").mkdir()
    (tmp_path / "texts" / ".git" / "config").write_text("hidden")
    return tmp_path / "texts"


def every(source):
    return source.fetch(np.arange(len(source)))


def text(source):
    """All tokens of packed text, in order, decoded."""
    return source.decode(every(source)["tokens"].ravel())


def test_targets_are_the_tokens_one_place_later(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789abcdef")
    source = TextData(path=str(tmp_path / "a.txt"), seq_len=5, eval_fraction=0.0).open("train")
    found = source.fetch(np.array([2, 0]))
    assert list(found) == ["tokens", "targets"]
    assert [source.decode(row) for row in found["tokens"]] == ["abcde", "01234"]
    assert [source.decode(row) for row in found["targets"]] == ["bcdef", "12345"]
    assert all(array.dtype == np.int64 and array.flags.c_contiguous for array in found.values())
    assert len(source) == 3
    assert source.tokens_per_sample == 5
    assert source.vocab_size == 256


def test_a_window_needs_one_token_more_than_its_length(tmp_path):
    for size, expected in ((10, 1), (11, 2), (15, 2), (16, 3)):
        (tmp_path / "a.txt").write_bytes(b"x" * (size - 1))  # and the newline behind the file
        assert len(TextData(path=str(tmp_path / "a.txt"), seq_len=5, eval_fraction=0.0).open("train")) == expected


def test_text_survives_encoding_and_decoding(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 200)
    source = TextData(path=str(tmp_path / "a.txt"), seq_len=8).open("train")
    assert source.decode(source.encode("naïve 漢字\n")) == "naïve 漢字\n"
    assert source.encode("ab").tolist() == [97, 98]
    assert source.decode([0xFF]) == "\N{REPLACEMENT CHARACTER}"


def test_files_come_in_the_order_of_their_names(folder):
    source = TextData(path=str(folder), seq_len=1, eval_fraction=0.0).open("train")
    numbers = [line.split()[1] for line in text(source).splitlines() if line]
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("[0-9]*.txt"))
    assert list(dict.fromkeys(numbers)) == [name[-6:-4] for name in names]


def test_train_and_eval_share_no_file(folder):
    data = TextData(path=str(folder), seq_len=1, eval_fraction=0.2)
    sides = [set(text(data.open(split)).split()) - {"file"} for split in ("train", "eval")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40
    assert 2 <= len(sides[1]) <= 16


def test_a_new_file_moves_no_other_to_the_other_side(folder):
    files = find_files([str(folder)], "**/*")
    before = set(split_files(files, 0.2, "eval"))
    (folder / "new.txt").write_text("new")
    after = set(split_files(find_files([str(folder)], "**/*"), 0.2, "eval"))
    assert before <= after
    assert len(after - before) <= 1


@pytest.mark.parametrize("fraction", [0.000001, 0.999999])
def test_each_side_of_a_split_has_a_file(folder, fraction):
    files = find_files([str(folder / "0*.txt")], "**/*")
    sides = [split_files(files, fraction, split) for split in ("train", "eval")]
    assert [len(side) for side in sides] == ([4, 1] if fraction < 0.5 else [1, 4])


def test_a_single_file_is_split_by_position_after_a_line(tmp_path):
    lines = [f"line {number}\n" for number in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    data = TextData(path=str(tmp_path / "a.txt"), seq_len=1, eval_fraction=0.25)
    train, held_out = text(data.open("train")), text(data.open("eval"))
    assert train + held_out == "".join(lines)
    assert train.endswith("\n")
    assert 0.2 < len(held_out) / len(train + held_out) < 0.3


def test_eval_files_of_their_own_leave_the_others_whole(folder, tmp_path):
    (tmp_path / "eval.txt").write_text("held out")
    data = TextData(path=str(folder), eval_path=str(tmp_path / "eval.txt"), seq_len=1)
    assert text(data.open("eval")) == "held out"
    assert len(set(text(data.open("train")).split())) == 41


def test_nothing_held_out_means_no_evaluation(folder):
    assert TextData(path=str(folder), eval_fraction=0.0).open("eval") is None


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("{}", "**/*", 40),
        ("{}", "*.txt", 20),
        ("{}/deep", "**/*", 20),
        ("{}/*.txt", "**/*", 20),
        ("{}/**/*.txt", "**/*", 40),
        ("{}/**", "**/*", 40),
        ("{}/d*p/1?.txt", "**/*", 5),
        ("{}/00.txt", "**/*", 1),
        (("{}/00.txt", "{}/02.txt", "{}/0*.txt"), "**/*", 5),
    ],
)
def test_a_path_is_a_file_a_folder_a_glob_or_several(folder, path, pattern, expected):
    paths = [each.format(folder) for each in ([path] if isinstance(path, str) else path)]
    files = find_files(paths, pattern)
    assert len(files) == expected
    assert not any("hidden" in file.read().decode() for file in files)


def test_names_do_not_depend_on_where_the_folder_is(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    data = TextData(path=str(folder), seq_len=4)
    before = data.open("train").fingerprint()
    folder.rename(elsewhere)
    assert dataclasses.replace(data, path=str(elsewhere)).open("train").fingerprint() == before


def test_fingerprints_follow_files_sizes_and_options(folder):
    data = TextData(path=str(folder), seq_len=8, eval_fraction=0.5)
    variants = [
        data,
        dataclasses.replace(data, seq_len=9),
        dataclasses.replace(data, eval_fraction=0.3),
        dataclasses.replace(data, pack=False),
        dataclasses.replace(data, pack=False, lines=True),
        dataclasses.replace(data, pattern="*.txt"),
    ]
    prints = {variant.open("train").fingerprint() for variant in variants}
    prints |= {data.open("eval").fingerprint()}
    assert data.open("train").fingerprint() in prints
    for file in find_files([str(folder)], "**/*"):
        file.path.write_text("longer" * 20)
    prints |= {data.open("train").fingerprint()}
    assert len(prints) == 8


def test_documents_of_their_own_are_cut_or_padded_and_weighted(tmp_path):
    (tmp_path / "a.txt").write_text("abc\n\nabcdefgh\r\nx\n")
    source = TextData(path=str(tmp_path / "a.txt"), seq_len=5, pack=False, lines=True, eval_fraction=0.0).open("train")
    found = source.fetch(np.arange(3))
    assert found["weight"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert found["weight"].dtype == np.float32
    assert [bytes(row.tolist()) for row in found["tokens"]] == [b"abc\n\0", b"abcde", b"x\n\0\0\0"]
    assert [bytes(row.tolist()) for row in found["targets"]] == [b"bc\n\0\0", b"bcdef", b"\n\0\0\0\0"]
    assert len(source) == 3


def test_files_can_be_documents(folder):
    source = TextData(path=str(folder), seq_len=60, pack=False, eval_fraction=0.0).open("train")
    assert len(source) == 40
    assert (every(source)["weight"].sum(axis=1) == 40).all()


def test_the_standard_library_is_always_there_and_quick_to_read():
    began = time.perf_counter()
    data = TextData(path=PYTHON_STDLIB)
    train, held_out = data.open("train"), data.open("eval")
    assert time.perf_counter() - began < 3  # 0.1 on an idle core
    assert 5e6 < len(train) * 128 < 25e6
    assert 0.03 < len(held_out) / len(train) < 0.3
    assert train.fingerprint() == data.open("train").fingerprint()


def test_the_standard_library_is_split_by_file():
    files = find_files([PYTHON_STDLIB], "**/*")
    sides = [split_files(files, 0.1, split) for split in ("train", "eval")]
    assert not set(sides[0]) & set(sides[1])
    assert len(sides[0]) + len(sides[1]) == len(files) > 400
    names = [file.name for file in files]
    assert names == sorted(names)
    assert "json/__init__.py" in names
    assert not [name for name in names if "site-packages" in name or "/test" in name or name.startswith("_sysconfig")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/nowhere/a.txt"}, "data.path names '/nowhere/a.txt', which is no file, folder or glob; correct it"),
        ({"path": "/nowhere/*.txt"}, r"no file in '/nowhere' fits the pattern '\*.txt'"),
        ({"path": "{}", "pattern": "*.md"}, r"no file in '.*texts' fits the pattern '\*.md'"),
        (
            {"path": "{}/00.txt"},
            r"train split of .*00.txt' holds .. tokens, but one sample takes 129; lower",
        ),
        ({"path": "{}/00.txt", "seq_len": 20, "split": "eval"}, "set data.eval_fraction: 0"),
        ({"path": ""}, "data.path is ''; give a file"),
        ({"path": ()}, r"data.path is \(\); give a file"),
        ({"path": "{}", "seq_len": 0}, "data.seq_len is 0"),
        ({"path": "{}", "eval_fraction": 1.0}, "data.eval_fraction is 1.0"),
        ({"path": "{}", "tokenizer": "/nowhere.json"}, "data.tokenizer is '/nowhere.json', where there is no file"),
        ({"path": "{}", "split": "test"}, "split is 'test'"),
    ],
)
def test_mistakes_in_a_recipe_are_named(folder, options, message):
    path = options["path"].format(folder) if options["path"] else options["path"]
    chosen = {name: value for name, value in options.items() if name not in ("path", "split")}
    with pytest.raises(RecipeError, match=message):
        TextData(path=path, **chosen).open(options.get("split", "train"))


def test_a_file_that_cannot_be_read_is_named(folder, tmp_path):
    files = find_files([str(folder)], "**/*")
    files[0].path.unlink()
    with pytest.raises(DataError, match=r"texts/00.txt could not be read: No such file"):
        files[0].read()


@pytest.fixture
def tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["[UNK]", "<|endoftext|>", "one", "two", "three"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_a_hugging_face_tokenizer_is_used_whole_with_documents_apart(tokenizer_json, tmp_path):
    (tmp_path / "a.txt").write_text("one two three\ntwo four\n")
    data = TextData(path=str(tmp_path / "a.txt"), tokenizer=tokenizer_json, lines=True, seq_len=6, eval_fraction=0.0)
    source = data.open("train")
    assert source.vocab_size == 5
    found = source.fetch(np.array([0]))
    assert found["tokens"].tolist() == [[2, 3, 4, 1, 3, 0]]
    assert found["targets"].tolist() == [[3, 4, 1, 3, 0, 1]]
    assert source.encode("two one").tolist() == [3, 2]
    assert source.decode([3, 2, 1]) == "two one <|endoftext|>"
    plain = dataclasses.replace(data, tokenizer="bytes").open("train")
    assert plain.fingerprint() != source.fingerprint()


def test_a_tokenizer_works_for_documents_too(tokenizer_json, tmp_path):
    (tmp_path / "a.txt").write_text("one two three\ntwo\n   \n")
    data = TextData(
        path=str(tmp_path / "a.txt"), tokenizer=tokenizer_json, lines=True, pack=False, seq_len=4, eval_fraction=0.0
    )
    found = every(data.open("train"))
    assert found["targets"].tolist() == [[3, 4, 1, 0], [1, 0, 0, 0]]
    assert found["weight"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("x" * 2000)
    with pytest.raises(RecipeError, match=r"a.txt is no tokenizer.json that the package tokenizers can read"):
        TextData(path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "a.txt")).open("train")


def test_a_tokenizer_without_its_package_says_what_to_install(tokenizer_json, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"needs tokenizers: pip install 'unitrain\[tokenizers\]'"):
        TextData(path=str(folder), tokenizer=tokenizer_json).open("train")
