"""A manifest is exact or it is damaged: coverage, the seal, and hostile documents."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unitrain.checkpoint.files import FileRecord
from unitrain.checkpoint.manifest import FORMAT, Box, Manifest, Part, Tensor, prove_coverage
from unitrain.checkpoint.strict import seal, unseal
from unitrain.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch

pytestmark = pytest.mark.fast

A_FILE = "part-0-0.safetensors"
HASH = hashlib.sha256(b"").hexdigest()


def tensor(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    placed = tuple(Box(A_FILE, f"t{number:06d}", *box) for number, box in enumerate(boxes))
    return Tensor(role="model", kind="param", name="w", dtype="float32", shape=shape, boxes=placed)


@pytest.mark.parametrize(
    "whole",
    [
        tensor((), ((), ())),
        tensor((0, 5)),
        tensor((4,), ((0,), (4,))),
        tensor((4, 6), ((0, 0), (1, 6)), ((1, 0), (3, 2)), ((1, 2), (3, 4))),
        # a pinwheel: no straight cut separates its five boxes
        tensor((3, 3), ((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))),
    ],
)
def test_boxes_that_hold_each_element_once_are_proved(whole: Tensor) -> None:
    prove_coverage(whole)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (tensor(()), "1 elements, but its boxes hold 0"),
        (tensor((4,)), "4 elements, but its boxes hold 0"),
        (tensor((4,), ((0,), (3,))), "4 elements, but its boxes hold 3"),
        (tensor((4,), ((0,), (5,))), "no box of shape"),
        (tensor((4,), ((1,), (4,))), "no box of shape"),
        (tensor((4,), ((-1,), (4,))), "no box of shape"),
        (tensor((4,), ((0, 0), (4, 1))), "no box of shape"),
        (tensor((4,), ((0,), (4,)), ((2,), (0,))), "no box of shape"),
        (tensor((0, 5), ((0, 0), (0, 5))), "no box of shape"),
        (tensor((), ((), ()), ((), ())), "overlap"),
        (tensor((4,), ((0,), (2,)), ((0,), (2,))), "overlap"),
        (tensor((4, 4), ((0, 0), (3, 3)), ((2, 2), (2, 2)), ((0, 3), (1, 1)), ((3, 0), (1, 2))), "overlap"),
    ],
)
def test_gaps_overlaps_and_boxes_out_of_bounds_are_found(broken: Tensor, says: str) -> None:
    with pytest.raises(CheckpointDamaged, match=says):
        prove_coverage(broken)


@st.composite
def _cut_tensors(draw: st.DrawFn) -> Tensor:
    """A tensor cut into boxes by random planes."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    pieces = [(tuple(0 for _ in shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        offset, size = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, size[axis]))
        for start, length in ((0, cut), (cut, size[axis] - cut)):
            if length:
                where = tuple(o + start * (number == axis) for number, o in enumerate(offset))
                pieces.append((where, tuple(length if number == axis else s for number, s in enumerate(size))))
    return tensor(shape, *draw(st.permutations(pieces)))


@given(_cut_tensors(), st.randoms(use_true_random=False))
def test_coverage_agrees_with_counting_every_element(whole: Tensor, chance: random.Random) -> None:
    prove_coverage(whole)
    boxes = list(whole.boxes)
    number = chance.randrange(len(boxes))
    shift = tuple(chance.choice((-1, 0, 0, 1)) for _ in whole.shape)
    boxes[number] = boxes[number]._replace(
        offset=tuple(max(o + d, 0) for o, d in zip(boxes[number].offset, shift, strict=True)),
        shape=tuple(max(s + chance.choice((-1, 0, 0, 1)), 1) for s in boxes[number].shape),
    )
    counts = np.zeros([size + 8 for size in whole.shape], dtype=int)
    for box in boxes:
        counts[tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape, strict=True))] += 1
    inside = counts[tuple(slice(0, size) for size in whole.shape)]
    exact = bool((inside == 1).all()) and counts.sum() == math.prod(whole.shape)
    changed = tensor(whole.shape, *((box.offset, box.shape) for box in boxes))
    if exact:
        prove_coverage(changed)
    else:
        with pytest.raises(CheckpointDamaged):
            prove_coverage(changed)


def test_coverage_of_many_shards_takes_no_quadratic_time() -> None:
    rows = [((number, column), (1, 10)) for number in range(400) for column in range(0, 100, 10)]
    prove_coverage(tensor((400, 100), *rows))  # 4,000 boxes: pairs would be eight million


def document() -> dict[str, Any]:
    """A sound manifest, as JSON."""
    return {
        "format": FORMAT,
        "step": 100,
        "time": 1.5,
        "producer": {"strategy": "ddp"},
        "files": {
            A_FILE: {"size": 1000, "sha256": HASH},
            "part-0.json": {"size": 10, "sha256": HASH},
            "state.json": {"size": 2, "sha256": HASH},
        },
        "tensors": [
            {
                "role": "model",
                "kind": "param",
                "name": "w",
                "dtype": "float32",
                "shape": [4],
                "boxes": [
                    {"file": A_FILE, "key": "t000000", "offset": [0], "shape": [2]},
                    {"file": A_FILE, "key": "t000001", "offset": [2], "shape": [2]},
                ],
            }
        ],
    }


def test_a_manifest_is_read_as_it_was_written() -> None:
    manifest = Manifest.from_bytes(seal(document()), "here")
    assert manifest.step == 100
    assert manifest.tensors == (tensor((4,), ((0,), (2,)), ((2,), (2,))),)
    assert manifest.files[A_FILE] == FileRecord(1000, HASH)
    assert Manifest.from_bytes(manifest.to_bytes(), "here") == manifest


def test_a_sealed_document_is_plain_json() -> None:
    assert json.loads(seal({"a": 1}))["a"] == 1
    assert unseal(seal({"a": "é\n"}), "here") == {"a": "é\n"}


def test_every_flipped_bit_and_every_truncation_breaks_the_seal() -> None:
    data = seal({"format": 1, "text": "abc"})
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            with pytest.raises(CheckpointDamaged):
                unseal(bytes(changed), "here")
        with pytest.raises(CheckpointDamaged):
            unseal(data[:place], "here")


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what lies at a dotted path; `...` deletes it."""

    def apply(found: Any) -> None:
        *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in way:
            found = found[key]
        if value is ...:
            del found[last]
        else:
            found[last] = value

    return apply


BOX = "tensors/0/boxes/0"
HOSTILE: list[tuple[str, Any]] = [
    *[(key, ...) for key in ("format", "step", "time", "producer", "files", "tensors", "tensors/0/kind", f"{BOX}/key")],
    *[(key, value) for key in ("format", "step") for value in (None, -1, 1.0, 1e308, "1", True, [], 1 << 60)][1:],
    *[("time", value) for value in (None, "now", -1, True, 1e308, [])],
    *[("producer", value) for value in (None, [], "x")],
    *[("files", value) for value in (None, [], {}, {"state.json": None}, {"state.json": {"size": 1}})],
    *[(f"files/{name}", {"size": 1, "sha256": HASH}) for name in ("..", "..%2fx", "part-0-0.pkl", "a\nb", "CON", "")],
    ("files/part-0-0.safetensors/size", -1),
    ("files/part-0-0.safetensors/size", 15),
    ("files/part-0-0.safetensors/size", "1000"),
    ("files/part-0-0.safetensors/sha256", HASH.upper()),
    ("files/part-0-0.safetensors/sha256", None),
    ("files/state.json", ...),
    ("files/part-0-0.safetensors", ...),
    ("extra", 1),
    ("tensors/0/extra", 1),
    ("tensors", {}),
    ("tensors", [None]),
    ("tensors", [1, 2]),
    ("tensors/0/role", "../etc"),
    ("tensors/0/kind", "param\n"),
    ("tensors/0/kind", None),
    ("tensors/0/name", ""),
    ("tensors/0/name", "a\nb"),
    ("tensors/0/name", "\u202ew"),
    ("tensors/0/name", "w" * 10_000),
    ("tensors/0/dtype", "object"),
    ("tensors/0/dtype", ["float32"]),
    ("tensors/0/shape", None),
    ("tensors/0/shape", [4.0]),
    ("tensors/0/shape", [-4]),
    ("tensors/0/shape", [1 << 62]),
    ("tensors/0/shape", [1 << 40, 1 << 40]),
    ("tensors/0/shape", [0, 1 << 40, 1 << 40]),
    ("tensors/0/shape", [1] * 100),
    ("tensors/0/shape", [True]),
    ("tensors/0/boxes", None),
    ("tensors/0/boxes", [[]]),
    ("tensors/0/boxes", []),
    (f"{BOX}/file", "state.json"),
    (f"{BOX}/file", "part-0.json"),
    (f"{BOX}/file", "../../etc/passwd"),
    (f"{BOX}/file", "/etc/passwd"),
    (f"{BOX}/file", "part-9-9.safetensors"),
    (f"{BOX}/file", None),
    (f"{BOX}/key", "w"),
    (f"{BOX}/key", "t000001"),
    (f"{BOX}/key", 0),
    (f"{BOX}/offset", [1]),
    (f"{BOX}/offset", []),
    (f"{BOX}/offset", [0, 0]),
    (f"{BOX}/offset", ["0"]),
    (f"{BOX}/shape", [3]),
    (f"{BOX}/shape", [1]),
    (f"{BOX}/shape", [0]),
    (f"{BOX}/shape", [2, 1]),
    (f"{BOX}/shape", [1 << 50]),
]


@pytest.mark.parametrize(("path", "value"), HOSTILE, ids=[f"{path}={str(value)[:20]!r}" for path, value in HOSTILE])
def test_a_hostile_manifest_is_damage_though_its_seal_is_right(path: str, value: Any) -> None:
    changed = document()
    change(path, value)(changed)
    with pytest.raises((CheckpointDamaged, CheckpointMismatch)) as raised:
        Manifest.from_bytes(seal(changed), "the manifest")
    later_format = path == "format" and type(value) is int and value > FORMAT
    assert isinstance(raised.value, CheckpointMismatch) == (later_format and value <= 1 << 56)
    assert "the manifest" in str(raised.value) or "'w'" in str(raised.value)


def test_a_later_format_asks_for_a_later_version() -> None:
    with pytest.raises(CheckpointMismatch, match="install the version that wrote it"):
        Manifest.from_bytes(seal({**document(), "format": FORMAT + 1}), "here")


def test_a_tensor_listed_twice_is_damage() -> None:
    changed = document()
    twin = copy.deepcopy(changed["tensors"][0])
    for number, box in enumerate(twin["boxes"]):
        box["key"] = f"t00001{number}"
    changed["tensors"].append(twin)
    with pytest.raises(CheckpointDamaged, match="twice"):
        Manifest.from_bytes(seal(changed), "here")


def sealed_text(text: str) -> bytes:
    """Any text with a right seal, as only an attacker writes it."""
    body = text.encode()
    return body + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1",
        "null",
        '{"a":NaN',
        '{"a":Infinity',
        '{"a":1,"a":2',
        '{"a":{"b":1,"b":1}',
        '{"a":' + "9" * 5000,
        '{"a":' + "[" * 200_000,
        '{"a":"\ud800"'.encode("utf-8", "surrogatepass").decode("latin-1"),
        '{"format":1,"step":1',
        "\ufeff{}",
    ],
    ids=range(13),
)
def test_hostile_text_is_damage_though_its_seal_is_right(text: str) -> None:
    with pytest.raises(CheckpointDamaged):
        Manifest.from_bytes(sealed_text(text), "here")


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
), st.sampled_from(sorted(document())))  # fmt: skip
def test_no_value_in_any_place_crashes_the_reader(value: Any, key: str) -> None:
    changed = {**document(), key: value}
    try:
        manifest = Manifest.from_bytes(seal(changed), "here")
    except (CheckpointDamaged, CheckpointMismatch):
        return
    assert manifest.to_bytes() == seal(changed) or key in ("time", "tensors")
    assert key != "tensors" or value == []


def part(writer: int, *tensors: Tensor) -> Part:
    return Part(step=1, writer=writer, writers=2, files={}, tensors=tensors)


def test_parts_that_contradict_each_other_are_refused() -> None:
    one = tensor((4,), ((0,), (2,)))
    other = tensor((5,), ((2,), (3,)))
    with pytest.raises(CheckpointError, match="writer 1 has model param 'w' as float32"):
        Manifest.of_parts([part(0, one), part(1, other)], {}, time=0, producer={})


def test_parts_that_leave_a_gap_are_refused() -> None:
    one = tensor((4,), ((0,), (2,)))
    with pytest.raises(CheckpointError, match="4 elements, but its boxes hold 2"):
        Manifest.of_parts([part(0, one), part(1)], {}, time=0, producer={})


def test_a_part_is_read_as_it_was_written_and_strictly() -> None:
    written = part(1, tensor((4,), ((0,), (2,))))
    assert Part.from_bytes(written.to_bytes(), "here") == written
    with pytest.raises(CheckpointDamaged):
        Part.from_bytes(written.to_bytes()[:-1], "here")
