"""What was saved is what is read, whoever cut it into which boxes; and a failed save harms nothing."""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from unitrain.checkpoint import CheckpointReader, Saver, SaveReport, list_checkpoints, newest, open_newest
from unitrain.checkpoint.arena import Arena
from unitrain.checkpoint.container import ELEMENT_TYPES
from unitrain.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from unitrain.strategy import Shard, TensorInfo

pytestmark = pytest.mark.fast

_folders = itertools.count()


def saver(root: str | Path, *, writer: int = 0, writers: int = 1, keep: int = 3, **changes: Any) -> Saver:
    reports: list[SaveReport] = []
    settings: dict[str, Any] = {
        "nonce": "a",
        "asynchronous": True,
        "producer": {"strategy": "single"},
        "report": reports.append,
        **changes,
    }
    made = Saver(str(root), writer=writer, writers=writers, keep=keep, **settings)
    made.reports = reports  # type: ignore[attr-defined]  # for the tests alone
    return made


def whole(name: str, data: NDArray[Any], *, kind: str = "param", dtype: str | None = None) -> Shard:
    return Shard(name, kind, dtype or str(data.dtype), data.shape, (0,) * data.ndim, data)


def numbers(step: int = 0, size: int = 1000) -> NDArray[np.float32]:
    return np.random.default_rng(step).standard_normal(size, dtype=np.float32)


def save(root: str | Path, step: int, **changes: Any) -> None:
    """Save one tensor that the step determines."""
    one = saver(root, **changes)
    one.save(step, {"model": [whole("w", numbers(step))]}, {"step": step})
    one.wait()
    one.close()


def assert_holds(reader: CheckpointReader | None, step: int) -> None:
    assert reader is not None
    assert (reader.step, reader.state) == (step, {"step": step})
    np.testing.assert_array_equal(reader.role("model").read("param", "w", (0,), (1000,)), numbers(step))


def every_kind_of_tensor() -> list[Shard]:
    chance = np.random.default_rng(0)
    shards = []
    for dtype, element in ELEMENT_TYPES.items():
        for shape in ((), (1,), (3, 5), (0,), (2, 0, 3), (2, 3, 2)):
            raw = chance.integers(0, 2 if dtype == "bool" else 256, math.prod(shape) * element.numpy.itemsize)
            data = raw.astype(np.uint8).view(element.numpy).reshape(shape)
            shards.append(whole(f"{dtype}{list(shape)}", data, dtype=dtype))
    return shards


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    shards = every_kind_of_tensor()
    one = saver(tmp_path)
    one.save(7, {"model": shards}, {})
    one.wait()
    role = CheckpointReader(tmp_path / "s00000007-a").role("model")
    assert role.tensors == {("param", shard.name): TensorInfo(shard.dtype, shard.shape) for shard in shards}
    for shard in shards:
        found = role.read("param", shard.name, shard.offset, shard.shape)
        assert (found.dtype, found.shape, found.tobytes()) == (shard.data.dtype, shard.shape, shard.data.tobytes())
        assert found.flags.writeable
        assert found.flags.c_contiguous


def cuts(draw: st.DrawFn, shape: tuple[int, ...], pieces: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of a tensor: some planes through it, at random."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(pieces):
        if not shape:
            break
        offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, size[axis]))
        for start, length in ((0, cut), (cut, size[axis] - cut)):
            boxes.append((
                tuple(o + start * (number == axis) for number, o in enumerate(offset)),
                tuple(length if number == axis else s for number, s in enumerate(size)),
            ))  # fmt: skip
    return boxes


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_boxes_of_three_writers_are_read_in_any_boxes(tmp_path: Path, data: st.DataObject) -> None:
    root = tmp_path / str(next(_folders))
    tensors: dict[str, NDArray[Any]] = {}
    shards: list[list[Shard]] = [[], [], []]
    for number in range(data.draw(st.integers(1, 3))):
        shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=3)))
        dtype = data.draw(st.sampled_from(("float32", "bfloat16", "int64", "bool")))
        values = np.random.default_rng(number).integers(0, 2, shape).astype(ELEMENT_TYPES[dtype].numpy)
        tensors[f"t{number}"] = values
        for offset, size in cuts(data.draw, shape, 5):
            box = values[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
            shard = Shard(f"t{number}", "param", dtype, shape, offset, np.ascontiguousarray(box).reshape(size))
            shards[data.draw(st.integers(0, 2))].append(shard)
    savers = [saver(root, writer=writer, writers=3, file_bytes=64) for writer in range(3)]
    for one, mine in zip(savers, shards, strict=True):
        one.save(1, {"model": mine}, {})
    for one in savers:
        one.wait()
    role = CheckpointReader(root / "s00000001-a").role("model")
    for name, values in tensors.items():
        for offset, size in cuts(data.draw, values.shape, 3):
            found = role.read("param", name, offset, size)
            expected = values[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
            np.testing.assert_array_equal(found, expected, strict=True)


def test_roles_are_kept_apart(tmp_path: Path) -> None:
    one = saver(tmp_path)
    one.save(1, {"model": [whole("w", numbers(1))], "critic": [whole("w", numbers(2))]}, {})
    one.wait()
    reader = CheckpointReader(tmp_path / "s00000001-a")
    assert reader.roles == ["critic", "model"]
    np.testing.assert_array_equal(reader.role("critic").read("param", "w", (0,), (1000,)), numbers(2))
    with pytest.raises(CheckpointMismatch, match=r"no role 'actor'; it has critic, model"):
        reader.role("actor")


def test_the_files_are_safetensors_and_json(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = tmp_path / "s00000005-a"
    assert sorted(os.listdir(folder)) == ["MANIFEST.json", "part-0-0.safetensors", "part-0.json", "state.json"]
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["producer"]) == (1, 5, {"strategy": "single"})
    (box,) = manifest["tensors"][0]["boxes"]
    with safe_open(folder / box["file"], framework="numpy") as opened:
        np.testing.assert_array_equal(opened.get_tensor(box["key"]), numbers(5))


def test_only_tensors_and_boxes_that_are_there_can_be_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    role = CheckpointReader(tmp_path / "s00000001-a").role("model")
    with pytest.raises(CheckpointMismatch, match="no param 'v'"):
        role.read("param", "v", (0,), (1,))
    for offset, shape in (((1,), (1000,)), ((-1,), (5,)), ((0, 0), (1, 1)), ((), ()), ((0,), (-1,))):
        with pytest.raises(CheckpointMismatch, match="no box of shape"):
            role.read("param", "w", offset, shape)
    assert role.read("param", "w", (1000,), (0,)).shape == (0,)


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        (whole("w", numbers(), dtype="bfloat16"), "is bfloat16, but its shard holds float32"),
        (whole("w", numbers(), dtype="float31"), "dtype 'float31'"),
        (whole("w", numbers().astype(">f4"), dtype="float32"), "but its shard holds >f4"),
        (whole("", numbers()), "not 1 to 1024 printable"),
        (whole("w\n", numbers()), "not 1 to 1024 printable"),
        (whole("w", numbers(), kind="../m"), "kind '../m'"),
        (Shard("w", "param", "float32", (10, 100), (0,), numbers()), "has shape"),
    ],
)
def test_a_shard_that_contradicts_itself_is_refused_before_anything_is_written(
    tmp_path: Path, shard: Shard, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        saver(tmp_path / "root").save(1, {"model": [shard]}, {})
    assert not (tmp_path / "root").exists()


def test_a_tensor_with_two_shapes_and_a_state_that_is_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="two dtypes or shapes"):
        saver(tmp_path).save(1, {"model": [whole("w", numbers()), whole("w", numbers(size=5))]}, {})
    with pytest.raises(CheckpointError, match="not JSON"):
        saver(tmp_path).save(1, {"model": []}, {"rng": object()})


class Gate:
    """Holds a save back in its second writer until the test lets it go on."""

    def __init__(self, root: Path) -> None:
        self.first, self.second = (saver(root, writer=writer, writers=2, patience_seconds=20) for writer in (0, 1))

    def begin(self, step: int, shards: list[Shard], state: dict[str, Any]) -> None:
        self.first.save(step, {"model": shards}, state)

    def release(self, step: int) -> None:
        self.second.save(step, {"model": []}, {})
        self.second.wait()


def test_what_changes_after_save_returns_is_not_saved(tmp_path: Path) -> None:
    gate, data, state = Gate(tmp_path), numbers(1), {"step": 1, "list": [1]}
    gate.begin(1, [whole("w", data)], state)
    data[:] = 0
    state["list"].append(2)  # type: ignore[attr-defined]
    gate.release(1)
    gate.first.wait()
    reader = open_newest(str(tmp_path)).reader
    assert reader is not None
    np.testing.assert_array_equal(reader.role("model").read("param", "w", (0,), (1000,)), numbers(1))
    assert reader.state == {"step": 1, "list": [1]}


def test_an_asynchronous_save_returns_before_the_checkpoint_exists_and_the_next_waits_for_it(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    gate.begin(1, [whole("w", numbers(1))], {"step": 1})
    assert newest(str(tmp_path)) is None
    threading.Timer(0.2, gate.release, (1,)).start()
    began = time.monotonic()
    gate.begin(2, [whole("w", numbers(2))], {"step": 2})
    assert time.monotonic() - began > 0.1
    assert_holds(open_newest(str(tmp_path)).reader, 1)
    gate.release(2)
    gate.first.wait()
    assert_holds(open_newest(str(tmp_path)).reader, 2)


def test_a_synchronous_save_is_there_when_it_returns(tmp_path: Path) -> None:
    one = saver(tmp_path, asynchronous=False)
    one.save(1, {"model": [whole("w", numbers(1))]}, {"step": 1})
    assert_holds(open_newest(str(tmp_path)).reader, 1)
    (report,) = one.reports  # type: ignore[attr-defined]
    assert (report.step, report.ok, report.bytes, report.error) == (1, True, 4000, None)
    assert 0 < report.stall_seconds < report.seconds


def test_memory_is_allocated_once_and_used_again() -> None:
    arena = Arena(slab_bytes=1024)
    slabs = []  # held, so that a new one cannot lie where a freed one was
    for _ in range(3):
        arena.clear()
        arena.put(np.arange(700, dtype=np.uint16))
        arena.put(np.array(True))
        slabs += [np.frombuffer(chunk, np.uint8) for chunk in arena.chunks(0, arena.used)]
        assert b"".join(arena.chunks(2, 1401)) == (np.arange(700, dtype=np.uint16).tobytes() + b"\1")[2:]
    assert len({slab.ctypes.data for slab in slabs}) == 2


def test_a_strided_array_is_copied_in_its_own_order(tmp_path: Path) -> None:
    data = np.arange(12, dtype=np.int32).reshape(3, 4).T
    one = saver(tmp_path)
    one.save(1, {"model": [whole("w", data)]}, {})
    one.wait()
    found = CheckpointReader(tmp_path / "s00000001-a").role("model").read("param", "w", (0, 0), (4, 3))
    np.testing.assert_array_equal(found, data)


def test_the_newest_are_kept_and_a_killed_attempts_leavings_go(tmp_path: Path) -> None:
    killed = tmp_path / "s00000050-killed"
    killed.mkdir()
    (killed / "part-0-0.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    one = saver(tmp_path, keep=2)
    for step in (10, 20, 30):
        one.save(step, {"model": [whole("w", numbers(step))]}, {"step": step})
    one.wait()
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "s00000020-a", "s00000030-a"]
    assert [found.step for found in list_checkpoints(str(tmp_path)).sound] == [20, 30]


def test_the_same_step_saved_twice_has_a_folder_of_its_own(tmp_path: Path) -> None:
    one = saver(tmp_path, keep=1)
    for value in (1, 2):
        one.save(10, {"model": [whole("w", numbers(value))]}, {})
    one.wait()
    assert os.listdir(tmp_path) == ["s00000010-a.2"]


def test_a_damaged_newer_checkpoint_does_not_crowd_out_sound_ones(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step, nonce="first")
    part = tmp_path / "s00000020-first" / "part-0-0.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    save(tmp_path, 15, nonce="second", keep=1)
    reader, passed_over = open_newest(str(tmp_path))
    assert_holds(reader, 15)
    assert [Path(passed.folder).name for passed in passed_over] == ["s00000020-first"]
    assert "part-0-0.safetensors is damaged" in passed_over[0].reason


@pytest.mark.parametrize("nonces", [("z", "a"), ("a", "z")])
def test_of_two_checkpoints_of_one_step_the_last_published_is_newest(tmp_path: Path, nonces: tuple[str, str]) -> None:
    for nonce in nonces:
        save(tmp_path, 10, nonce=nonce)
    found = newest(str(tmp_path))
    assert found is not None
    assert found.folder.endswith(f"s00000010-{nonces[1]}")


def test_a_writer_that_fails_fails_the_save_at_once_and_the_previous_one_stays(tmp_path: Path) -> None:
    savers = [saver(tmp_path, writer=writer, writers=2, patience_seconds=60) for writer in (0, 1)]

    def save_all(step: int) -> None:
        for writer, one in enumerate(savers):
            one.save(step, {"model": [whole("w", numbers(step))] if writer == 0 else []}, {"step": step})

    save_all(1)
    for one in savers:
        one.wait()
    (tmp_path / "s00000002-a").mkdir()
    (tmp_path / "s00000002-a" / "part-1.json.tmp").write_text("in the way")
    began = time.monotonic()
    save_all(2)
    with pytest.raises(CheckpointError, match="writer 1 could not write its part: FileExistsError"):
        savers[0].wait()
    with pytest.raises(CheckpointError, match="failed, the previous one stays: FileExistsError"):
        savers[1].wait()
    assert time.monotonic() - began < 10
    assert [one.failures for one in savers] == [1, 1]
    assert_holds(open_newest(str(tmp_path)).reader, 1)
    save_all(3)  # does not raise for the failure before it
    for one in savers:
        one.wait()
        assert [report.ok for report in one.reports] == [True, False, True]  # type: ignore[attr-defined]
        assert one.failures == 0
    assert_holds(open_newest(str(tmp_path)).reader, 3)
    assert sorted(os.listdir(tmp_path)) == ["s00000001-a", "s00000003-a"]


def test_a_writer_that_never_comes_fails_the_save_in_time(tmp_path: Path) -> None:
    one = saver(tmp_path, writers=3, patience_seconds=0.2)
    one.save(1, {"model": []}, {})
    with pytest.raises(CheckpointError, match=r"no part from writer 1, 2 in 0\.2 s"):
        one.wait()
    assert os.listdir(tmp_path) == []


def test_closing_does_not_wait_long_for_writers_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unitrain.checkpoint.saver._CLOSING_SECONDS", 0.1)
    one = saver(tmp_path, writers=2, patience_seconds=600)
    one.save(1, {"model": []}, {})
    began = time.monotonic()
    one.close()
    assert time.monotonic() - began < 5
    assert not one.reports[0].ok  # type: ignore[attr-defined]


@pytest.mark.parametrize("says", ["gap", "overlap", "shape"])
def test_writers_that_do_not_fit_together_publish_nothing(tmp_path: Path, says: str) -> None:
    halves = {"gap": ((0,), (2,), 6), "overlap": ((0,), (1,), 4), "shape": ((0,), (2,), 5)}
    first, second, size = halves[says]
    wholes = [(4,) if says != "gap" else (6,), (size,)]
    savers = [saver(tmp_path, writer=writer, writers=2) for writer in (0, 1)]
    for one, offset, shape in zip(savers, (first, second), wholes, strict=True):
        one.save(1, {"model": [Shard("w", "param", "float32", shape, offset, numbers(size=2))]}, {})
    expected = {"gap": "6 elements, but its boxes hold 4", "overlap": "overlap", "shape": "parts of the same tensor"}
    with pytest.raises(CheckpointError, match=expected[says]):
        savers[0].wait()
    savers[1].wait()
    assert newest(str(tmp_path)) is None


def test_an_error_of_the_report_reaches_the_caller(tmp_path: Path) -> None:
    def report(_: SaveReport) -> None:
        raise ZeroDivisionError

    one = saver(tmp_path, report=report)
    one.save(1, {"model": []}, {})
    with pytest.raises(ZeroDivisionError):
        one.wait()
    one.wait()  # told once


def test_old_checkpoints_that_cannot_be_deleted_are_told_and_fail_no_save(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    (tmp_path / "s00000001-a" / "folder").mkdir()  # of somebody else
    one = saver(tmp_path, keep=1)
    one.save(2, {"model": [whole("w", numbers(2))]}, {"step": 2})
    one.wait()
    assert one.reports[0].ok  # type: ignore[attr-defined]
    assert "could not be deleted" in one.reports[0].error  # type: ignore[attr-defined]
    assert_holds(open_newest(str(tmp_path)).reader, 2)


@pytest.fixture
def memory_url() -> Iterator[str]:
    import fsspec

    yield "memory://runs/checkpoints"
    fsspec.filesystem("memory").rm("/runs", recursive=True)


def test_any_fsspec_url_is_a_destination(memory_url: str) -> None:
    import fsspec

    savers = [saver(memory_url, writer=writer, writers=2, keep=2) for writer in (0, 1)]
    for step in (1, 2, 3):
        for writer, one in enumerate(savers):
            half = numbers(step)[writer * 500 : writer * 500 + 500]
            one.save(step, {"model": [Shard("w", "param", "float32", (1000,), (writer * 500,), half)]}, {"step": step})
    for one in savers:
        one.wait()
        assert all(report.ok and report.error is None for report in one.reports)  # type: ignore[attr-defined]
    assert [found.step for found in list_checkpoints(memory_url).sound] == [2, 3]
    assert_holds(open_newest(memory_url).reader, 3)

    system, part = fsspec.filesystem("memory"), "/runs/checkpoints/s00000003-a/part-1-0.safetensors"
    system.pipe_file(part, system.cat_file(part)[:-1] + b"!")
    reader, passed_over = open_newest(memory_url)
    assert_holds(reader, 2)
    assert passed_over[0].folder == f"{memory_url}/s00000003-a"
    with pytest.raises(CheckpointDamaged, match=r"part-1-0\.safetensors is damaged"):
        CheckpointReader(passed_over[0].folder).role("model").read("param", "w", (400,), (200,))


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    save(f"file://{tmp_path}/deep/er", 1)
    assert_holds(open_newest(str(tmp_path / "deep" / "er")).reader, 1)


def test_a_root_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    assert open_newest(str(tmp_path / "none")) == (None, [])
    assert newest("memory://none") is None
    assert list_checkpoints(str(tmp_path / "none")) == ([], [])


def test_ranks_can_tell_that_they_see_the_same_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    digests = [CheckpointReader(tmp_path / name).digest for name in ("s00000001-a", "s00000001-a", "s00000002-a")]
    assert digests[0] == digests[1] != digests[2]
