"""Arrays in memory, in .npz files, and scikit-learn's digits."""

from __future__ import annotations

import sys
import zipfile

import numpy as np
import pytest

from unitrain import registry
from unitrain.data.arrays import ArraysData, ArraySource, split_rows
from unitrain.data.digits import DigitsData
from unitrain.errors import DataError, MissingExtra, RecipeError

pytestmark = pytest.mark.fast


def every(source):
    return source.fetch(np.arange(len(source)))


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "train.npz"
    np.savez(path, x=np.arange(40.0).reshape(20, 2), y=np.arange(20))
    return str(path)


def test_rows_are_fetched_in_the_order_asked():
    found = ArraySource(x=np.arange(10).reshape(5, 2), y=[0, 1, 2, 3, 4]).fetch(np.array([3, 0, 3]))
    assert {name: array.tolist() for name, array in found.items()} == {"x": [[6, 7], [0, 1], [6, 7]], "y": [3, 0, 3]}


def test_fetched_rows_are_copies():
    kept = np.zeros(4)
    ArraySource(x=kept).fetch(np.array([0, 1]))["x"][:] = 7
    assert not kept.any()


@pytest.mark.parametrize("name", ["self", "x"])
def test_any_array_name_will_do(name):
    assert list(every(ArraySource(**{name: [1, 2]}))) == [name]


@pytest.mark.parametrize("arrays", [{"x": np.zeros((3, 2)), "y": np.zeros(4)}, {"x": 5, "y": [1]}])
def test_arrays_of_unequal_length_are_refused(arrays):
    with pytest.raises(DataError, match=r"one row per sample, as many in each; found x \(.*\), y \(.*\)"):
        ArraySource(**arrays)


def test_no_arrays_are_refused():
    with pytest.raises(DataError, match="no arrays"):
        ArraySource()


def test_fingerprints_tell_arrays_apart():
    variants = [{"x": np.zeros(3)}, {"x": np.zeros(4)}, {"x": np.zeros(3, np.int64)}, {"z": np.zeros(3)}]
    assert len({ArraySource(**arrays).fingerprint() for arrays in variants}) == 4


def test_a_file_is_split_into_rows_that_share_none(npz):
    data = ArraysData(path=npz, eval_fraction=0.25)
    train, held_out = every(data.open("train")), every(data.open("eval"))
    assert len(train["y"]) == 15
    assert len(held_out["y"]) == 5
    assert sorted([*train["y"], *held_out["y"]]) == list(range(20))
    assert np.array_equal(train["x"][:, 0], train["y"] * 2.0)


def test_an_eval_file_leaves_the_train_file_whole(npz, tmp_path):
    np.savez(tmp_path / "eval.npz", x=np.zeros((3, 2)), y=np.zeros(3))
    data = ArraysData(path=npz, eval_path=str(tmp_path / "eval.npz"))
    assert [len(data.open(split)) for split in ("train", "eval")] == [20, 3]


def test_nothing_held_out_means_no_evaluation(npz):
    data = ArraysData(path=npz, eval_fraction=0.0)
    assert len(data.open("train")) == 20
    assert data.open("eval") is None


def test_held_out_rows_are_spread_over_the_file_and_never_change():
    held_out = split_rows(1000, 0.1, "eval")
    assert len(held_out) == 100
    assert np.bincount(held_out // 100, minlength=10).min() >= 3
    assert held_out[:5].tolist() == [1, 30, 37, 51, 58]


@pytest.mark.parametrize("rows", [2, 3, 10])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_each_side_of_a_split_has_a_row(rows, fraction):
    sides = [split_rows(rows, fraction, split) for split in ("train", "eval")]
    assert all(len(side) for side in sides)
    assert sorted(np.concatenate(sides)) == list(range(rows))


def test_one_row_cannot_be_split():
    with pytest.raises(RecipeError, match=r"set data.eval_fraction: 0"):
        split_rows(1, 0.1, "train")


def test_an_absent_file_is_the_recipes_fault(npz):
    with pytest.raises(RecipeError, match=r"data.path is '/nowhere.npz', where there is no file"):
        ArraysData(path="/nowhere.npz").open("train")
    with pytest.raises(RecipeError, match=r"data.eval_path is '/nowhere.npz'"):
        ArraysData(path=npz, eval_path="/nowhere.npz").open("eval")


def test_pickles_are_never_opened(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"could not be read as an .npz file of plain arrays"):
        ArraysData(path=str(tmp_path / "objects.npz")).open("train")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(DataError, match="could not be read"):
        ArraysData(path=str(tmp_path / "text.npz")).open("train")


def test_one_array_without_a_name_is_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"one array without a name; save named arrays with numpy.savez"):
        ArraysData(path=str(tmp_path / "one.npy")).open("train")


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "damaged.npz"
    np.savez(path, x=np.arange(1000))
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("x.npy").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 2000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged.npz could not be read"):
        ArraysData(path=str(path)).open("train")


def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(npz):
    for data in (lambda: ArraysData(path=npz, eval_fraction=1.0), lambda: DigitsData(eval_fraction=-0.1)):
        with pytest.raises(RecipeError, match=r"data.eval_fraction is"):
            data()


def test_an_unknown_split_is_refused(npz):
    with pytest.raises(RecipeError, match="split is 'test'; it must be one of train, eval"):
        ArraysData(path=npz).open("test")


def test_digits_are_small_pictures_with_labels():
    pytest.importorskip("sklearn")
    train, held_out = (registry.load("sources", "digits")().open(split) for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (1438, 359)
    found = every(train)
    assert found["x"].shape == (1438, 1, 8, 8)
    assert found["x"].dtype == np.float32
    assert (found["x"].min(), found["x"].max()) == (0, 1)
    assert found["y"].dtype == np.int64
    assert set(found["y"]) == set(every(held_out)["y"]) == set(range(10))
    assert train.num_classes == 10
    assert train.shape == (1, 8, 8)


def test_digits_can_be_flat_and_whole():
    pytest.importorskip("sklearn")
    data = DigitsData(flat=True, eval_fraction=0.0)
    assert data.open("eval") is None
    source = data.open("train")
    assert source.shape == (64,)
    assert source.fetch(np.array([0, 1]))["x"].shape == (2, 64)
    assert len(source) == 1797


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"needs scikit-learn: pip install 'unitrain\[digits\]'"):
        DigitsData().open("train")
