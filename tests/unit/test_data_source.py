"""Map-style datasets as sources: what is stacked, and what is said where it cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from unitrain.data import DatasetSource, Source
from unitrain.errors import DataError

pytestmark = pytest.mark.fast


def fetch(dataset, *ids, **options):
    return DatasetSource(dataset, **options).fetch(np.array(ids or range(len(dataset)), dtype=np.int64))


def test_pairs_become_x_and_y():
    found = fetch([([1.0, 2.0], 0), ([3.0, 4.0], 1), ([5.0, 6.0], 2)], 2, 0)
    assert {name: array.tolist() for name, array in found.items()} == {"x": [[5.0, 6.0], [1.0, 2.0]], "y": [2, 0]}


def test_tuples_take_the_names_given():
    found = fetch([(1, 2, 3), (4, 5, 6)], names=("image", "mask", "label"))
    assert {name: array.tolist() for name, array in found.items()} == {"image": [1, 4], "mask": [2, 5], "label": [3, 6]}


def test_mappings_are_stacked_key_by_key():
    found = fetch([{"image": np.zeros((2, 2), np.uint8), "label": 1}, {"image": np.ones((2, 2), np.uint8), "label": 0}])
    assert found["image"].dtype == np.uint8
    assert found["image"].shape == (2, 2, 2)
    assert found["label"].tolist() == [1, 0]


def test_a_dataset_of_single_values_is_x():
    assert fetch([4, 5, 6])["x"].tolist() == [4, 5, 6]


def test_torch_datasets_and_tensors_become_arrays():
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 2]))
    found = fetch(torch.utils.data.Subset(dataset, [2, 0]))
    assert isinstance(found["x"], np.ndarray)
    assert found["x"].dtype == np.float32
    assert found["x"].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert found["y"].dtype == np.int64


def test_tensors_from_collate_become_arrays():
    torch = pytest.importorskip("torch")
    found = fetch([[1], [2, 3]], collate=lambda rows: {"x": torch.tensor([[*row, 0][:2] for row in rows])})
    assert isinstance(found["x"], np.ndarray)
    assert found["x"].tolist() == [[1, 0], [2, 3]]


def test_collate_sees_the_samples_in_order():
    assert fetch(["a", "b", "c"], 2, 1, collate=lambda texts: {"x": np.array(list(map(ord, texts)))})["x"].tolist() == [
        99,
        98,
    ]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([[[1, 2]], [[1, 2, 3]]], r"sample 1 has 'x' of shape \(3,\), but sample 0 of shape \(2,\); pass collate="),
        ([{"a": 1}, {"b": 1}], "sample 1 has b, but sample 0 has a; pass collate="),
        ([(1, 2, 3)], r"sample 0 has 3 parts, but names are given for 2; pass names="),
        ([("words", 1)], "sample 0 has 'x' of type str, which is no array of numbers; pass collate="),
        ([{"x": object()}], "sample 0 has 'x' of type object, which is no array of numbers; pass collate="),
        ([{"x": [[1], [2, 3]]}], "sample 0 has 'x' of type list, which is no array of numbers; pass collate="),
        ([{"x": None}], "sample 0 has 'x' of type NoneType, which is no array of numbers; pass collate="),
    ],
)
def test_samples_that_cannot_be_stacked_are_named_with_what_to_do(dataset, message):
    with pytest.raises(DataError, match=message):
        fetch(dataset)


def test_a_dataset_that_fails_names_the_sample():
    class Broken(list):
        def __getitem__(self, number):
            if number == 3:
                raise OSError("no such picture")
            return super().__getitem__(number)

    with pytest.raises(
        DataError, match=r"sample 3 of DatasetSource\(Broken\) could not be read: OSError: no such picture"
    ) as caught:
        fetch(Broken([1, 2, 3, 4]))
    assert isinstance(caught.value.__cause__, OSError)


def test_collate_must_name_its_arrays():
    with pytest.raises(DataError, match="collate returned a list; it must return a mapping of named arrays"):
        fetch([1, 2], collate=list)


def test_a_stream_is_no_map_style_dataset():
    with pytest.raises(DataError, match="generator has no __len__; give a map-style dataset"):
        DatasetSource(number for number in range(3))


def test_fingerprints_tell_datasets_apart():
    class Other(list):
        pass

    prints = {DatasetSource(dataset).fingerprint() for dataset in ([1], [1, 2], Other([1]))}
    assert len(prints) == 3
    assert DatasetSource([1]).fingerprint() == DatasetSource([1]).fingerprint()


def test_a_source_of_ones_own_needs_a_length_and_a_fetch():
    class Squares(Source):
        def __len__(self):
            return 5

        def fetch(self, ids):
            return {"x": ids**2}

    assert Squares().fetch(np.array([3]))["x"].tolist() == [9]
    assert Squares().fingerprint() == "Squares:5"
    assert repr(Squares()) == "Squares"
