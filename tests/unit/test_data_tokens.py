"""Token files as nanoGPT and Megatron-LM write them, however long."""

from __future__ import annotations

import resource
import struct
import time

import numpy as np
import pytest

from unitrain.data.tokens import TokensData
from unitrain.errors import DataError, RecipeError

pytestmark = pytest.mark.fast


def write_megatron(prefix, documents, dtype="uint16"):
    """What Megatron-LM's preprocess_data writes: one sequence a document."""
    code = {"uint8": 1, "int32": 4, "int64": 5, "float32": 7, "uint16": 8}[dtype]
    lengths = [len(document) for document in documents]
    offsets = (np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize).astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    body = (
        np.array(lengths, "<i4").tobytes() + offsets.tobytes() + np.arange(len(documents) + 1).astype("<i8").tobytes()
    )
    prefix.with_suffix(".idx").write_bytes(head + body)
    np.concatenate(documents).astype(dtype).tofile(prefix.with_suffix(".bin"))


@pytest.fixture
def nanogpt(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(1000, 1030, dtype=np.uint16).tofile(tmp_path / "val.bin")
    return tmp_path


@pytest.fixture
def megatron(tmp_path):
    write_megatron(tmp_path / "corpus", [np.arange(30), np.arange(100, 150), np.arange(5)], "int32")
    return tmp_path / "corpus"


def test_a_folder_of_nanogpt_has_train_and_val(nanogpt):
    data = TokensData(path=str(nanogpt), seq_len=10)
    train, val = data.open("train"), data.open("eval")
    found = train.fetch(np.array([3, 0]))
    assert found["tokens"].tolist() == [list(range(30, 40)), list(range(10))]
    assert found["targets"].tolist() == [list(range(31, 41)), list(range(1, 11))]
    assert all(array.dtype == np.int64 for array in found.values())
    assert (len(train), len(val)) == (9, 2)
    assert val.fetch(np.array([0]))["tokens"][0, 0] == 1000
    assert train.tokens_per_sample == 10
    assert train.vocab_size == 65536


def test_without_an_eval_file_the_end_is_held_out(nanogpt):
    data = TokensData(path=str(nanogpt / "train.bin"), seq_len=4, eval_fraction=0.2)
    train, held_out = data.open("train"), data.open("eval")
    assert train.fetch(np.arange(len(train)))["targets"].max() < 80
    assert held_out.fetch(np.array([0]))["tokens"][0].tolist() == [80, 81, 82, 83]
    assert TokensData(path=str(nanogpt / "train.bin"), seq_len=4).open("eval") is None


def test_an_eval_file_can_be_named(nanogpt):
    data = TokensData(path=str(nanogpt / "train.bin"), eval_path=str(nanogpt / "val.bin"), seq_len=4)
    assert (len(data.open("train")), len(data.open("eval"))) == (24, 7)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_a_megatron_prefix_means_its_bin_and_index(megatron, suffix):
    source = TokensData(path=f"{megatron}{suffix}", seq_len=8, vocab_size=200).open("train")
    assert len(source) == 10
    assert source.fetch(np.array([3]))["tokens"].tolist() == [[24, 25, 26, 27, 28, 29, 100, 101]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_the_index_tells_the_dtype(tmp_path, dtype):
    write_megatron(tmp_path / "corpus", [np.arange(50), np.arange(50)], dtype)
    source = TokensData(path=str(tmp_path / "corpus"), seq_len=49, vocab_size=50).open("train")
    assert source.fetch(np.array([1]))["tokens"][0, :3].tolist() == [49, 0, 1]


def test_wide_tokens_of_a_plain_file_need_their_dtype_and_vocabulary(tmp_path):
    np.array([70_000, 1, 2, 3, 4], dtype=np.uint32).tofile(tmp_path / "a.bin")
    with pytest.raises(
        RecipeError, match=r"holds uint32 tokens, which do not tell how many there are; set data.vocab_size"
    ):
        TokensData(path=str(tmp_path / "a.bin"), dtype="uint32", seq_len=4).open("train")
    source = TokensData(path=str(tmp_path / "a.bin"), dtype="uint32", seq_len=4, vocab_size=70_001).open("train")
    assert source.fetch(np.array([0]))["tokens"].tolist() == [[70_000, 1, 2, 3]]


def test_two_billion_tokens_open_and_fetch_at_once_in_little_memory(tmp_path):
    tokens = 2 * 10**9
    with (tmp_path / "train.bin").open("wb") as file:  # sparse: takes no disk
        file.truncate(2 * tokens)
        file.seek(2 * (tokens - 1024 - 1))
        file.write(np.arange(1025, dtype=np.uint16).tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    source = TokensData(path=str(tmp_path / "train.bin"), seq_len=1024).open("train")
    assert len(source) == (tokens - 1) // 1024
    found = source.fetch(np.linspace(0, len(source) - 1, 64).astype(np.int64))
    assert found["tokens"].shape == (64, 1024)
    assert found["targets"][-1].max() > 0
    assert time.perf_counter() - began < 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 64 * 1024  # KiB


def test_a_long_index_is_not_read(tmp_path):
    sequences = 10**8
    with (tmp_path / "a.idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, sequences, sequences + 1))
        file.seek(34 + 4 * (sequences - 1))
        file.write(struct.pack("<i", 500))
        file.seek(34 + 4 * sequences + 8 * (sequences - 1))
        file.write(struct.pack("<q", 10**9))
        file.truncate(34 + 12 * sequences + 8 * (sequences + 1))
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(10**9 + 1000)
    began = time.perf_counter()
    assert len(TokensData(path=str(tmp_path / "a"), seq_len=1000).open("train")) == 500_000
    assert time.perf_counter() - began < 5


def test_a_token_outside_the_vocabulary_names_its_sample(nanogpt):
    source = TokensData(path=str(nanogpt / "train.bin"), seq_len=10, vocab_size=50).open("train")
    source.fetch(np.array([0, 3]))
    with pytest.raises(
        DataError, match=r"sample 5 of .* holds token 50, but the vocabulary ends at 49; correct data.vocab"
    ):
        source.fetch(np.array([0, 5]))
    with pytest.raises(DataError, match=r"sample 4 of .* holds token 50"):  # as a target
        source.fetch(np.array([4]))


def test_fingerprints_follow_length_dtype_and_window(nanogpt):
    path = str(nanogpt / "train.bin")
    variants = [
        TokensData(path=path, seq_len=10),
        TokensData(path=path, seq_len=9),
        TokensData(path=path, seq_len=10, dtype="uint8"),
        TokensData(path=path, seq_len=10, eval_fraction=0.1),
        TokensData(path=str(nanogpt / "val.bin"), seq_len=10),
    ]
    assert len({data.open("train").fingerprint() for data in variants}) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/nowhere"}, "data.path leads to '/nowhere.bin', where there is no file"),
        ({"path": "{}/train.bin", "eval_path": "/nowhere.bin"}, "data.eval_path leads to '/nowhere.bin'"),
        ({"path": "{}/train.bin", "seq_len": 100}, "holds 100 tokens for this split, but one sample takes 101; lower"),
        ({"path": "{}", "dtype": "float32"}, "data.dtype is 'float32'; it must be one of auto"),
        ({"path": "{}", "seq_len": 0}, "data.seq_len is 0"),
        ({"path": "{}", "vocab_size": 0}, "data.vocab_size is 0"),
        ({"path": "{}", "eval_fraction": 2.0}, "data.eval_fraction is 2.0"),
    ],
)
def test_mistakes_in_a_recipe_are_named(nanogpt, options, message):
    with pytest.raises(RecipeError, match=message):
        TokensData(**{**options, "path": options["path"].format(nanogpt)}).open("train")


def test_a_dtype_that_contradicts_the_index_is_refused(megatron):
    with pytest.raises(RecipeError, match=r"data.dtype is 'uint16', but .*corpus.idx says int32; leave data.dtype out"):
        TokensData(path=str(megatron), dtype="uint16").open("train")


def test_damaged_files_are_named(megatron, tmp_path):
    index, tokens = megatron.with_suffix(".idx"), megatron.with_suffix(".bin")
    whole_index, whole_tokens = index.read_bytes(), tokens.read_bytes()

    def refused(message):
        with pytest.raises(DataError, match=message):
            TokensData(path=str(megatron), seq_len=8, vocab_size=200).open("train")

    tokens.write_bytes(whole_tokens[:-4])
    refused("corpus.idx promises 340 bytes, but .*corpus.bin has 336; one of them belongs to another run")
    tokens.write_bytes(whole_tokens)
    index.write_bytes(whole_index[:-40])
    refused("corpus.idx is cut short: it names 3 sequences; copy it again")
    index.write_bytes(whole_index[:20])
    refused("corpus.idx is no Megatron-LM index")
    index.write_bytes(b"X" + whole_index[1:])
    refused("corpus.idx is no Megatron-LM index; remove it if corpus.bin is a plain token file")
    index.write_bytes(whole_index[:9] + struct.pack("<Q", 2) + whole_index[17:])
    refused("has version 2 and dtype code 4; only version 1")
    index.write_bytes(whole_index[:17] + b"\x07" + whole_index[18:])
    refused("has version 1 and dtype code 7; only version 1 with whole numbers")
    index.unlink()
    tokens.write_bytes(whole_tokens[:-1])
    refused("has 339 bytes, which is no whole number of uint16 tokens")
    tokens.write_bytes(b"")
    refused("is empty")
