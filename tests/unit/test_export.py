"""Exports without a run: rounding, files of a bounded size, and a folder that is whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unitrain.errors import UnitrainError, UserError
from unitrain.export import pieces
from unitrain.export.pieces import Plan, Tensor, to_bfloat16, to_dtype
from unitrain.export.run import shard_bytes
from unitrain.export.writer import shards_of, write_folder

pytestmark = pytest.mark.fast


def tensor(name: str, values: Any, dtype: str = "float32") -> Tensor:
    array = np.asarray(values)
    return Tensor(name, dtype, array.shape, lambda start, stop: array[start:stop] if array.ndim else array)


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    edges = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000000, 0x00008000], np.uint32)
    values = np.concatenate([bits, edges]).view(np.float32)
    wanted = torch.from_numpy(values).to(torch.bfloat16)
    ours = torch.from_numpy(to_bfloat16(values).copy()).view(torch.bfloat16)
    finite = ~torch.isnan(wanted)
    assert torch.equal(ours[finite], wanted[finite])
    assert torch.equal(torch.isnan(ours), torch.isnan(wanted))
    assert to_dtype(np.float32([1.5]), "float16").dtype == np.float16


def test_parts_are_a_few_rows_whatever_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "ROWS_BYTES", 64)
    values = np.arange(70, dtype=np.float32).reshape(14, 5)
    parts = list(tensor("x", values).parts())
    assert max(part.nbytes for part in parts) <= 64
    assert np.array_equal(np.concatenate(parts), values)
    assert [part.shape for part in tensor("x", np.zeros((2, 100), np.float32)).parts()] == [(1, 100), (1, 100)]
    assert [part.shape for part in tensor("x", np.float32(3)).parts()] == [()]
    assert list(tensor("x", np.zeros((0, 3), np.float32)).parts()) == []


def test_files_are_no_larger_than_asked_but_for_single_tensors() -> None:
    tensors = [tensor(str(number), np.zeros(size, np.float32)) for number, size in enumerate((3, 3, 10, 1, 1))]
    files = shards_of(tensors, "model", 24)
    assert [[held.name for held in file.tensors] for file in files] == [["0", "1"], ["2"], ["3", "4"]]
    assert files[0].name == "model-00001-of-00003.safetensors"
    assert [file.name for file in shards_of(tensors, "model", 1000)] == ["model.safetensors"]


def test_a_folder_holds_tensors_files_and_copies(tmp_path: Path) -> None:
    copied = tmp_path / "tokenizer.json"
    copied.write_text("{}")
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(7), "c": np.zeros((0, 2), np.float32)}
    plan = Plan(
        tensors=[tensor(name, value) for name, value in values.items()], files={"config.json": b"{}"}, copies=[copied]
    )
    (tmp_path / "out").mkdir()  # an empty folder may be there
    files = write_folder(plan, tmp_path / "out", 1000)
    assert [file.name for file in files] == ["config.json", "model.safetensors", "tokenizer.json"]
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.tolist() for name, value in loaded.items()} == {n: v.tolist() for n, v in values.items()}


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing(start: int, stop: int) -> Any:
        raise OSError(28, "No space left on device")

    plan = Plan(tensors=[tensor("a", np.ones(2, np.float32)), Tensor("b", "float32", (3,), failing)])
    with pytest.raises(UnitrainError, match="No space left"):
        write_folder(plan, tmp_path / "out", 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        write_folder(Plan(tensors=[]), tmp_path, 1000)
    with pytest.raises(UserError, match="is a file"):
        write_folder(Plan(tensors=[]), tmp_path / "mine", 1000)


SIZES = [("1GB", 10**9), ("500mb", 5 * 10**8), ("2GiB", 2**31), ("1.5 KB", 1500), ("4096", 4096)]


@pytest.mark.parametrize(("text", "wanted"), SIZES)
def test_sizes_are_read_as_people_write_them(text: str, wanted: int) -> None:
    assert shard_bytes(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1PB", "many"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="write it as 500MB, 1GB or 2GiB"):
        shard_bytes(text)
