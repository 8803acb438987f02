"""Every changed, cut or missing byte is found, named and survived."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unitrain.checkpoint import CheckpointReader, Saver, list_checkpoints, newest, open_newest
from unitrain.checkpoint.manifest import FORMAT
from unitrain.checkpoint.strict import seal, unseal
from unitrain.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from unitrain.strategy import Shard

pytestmark = pytest.mark.fast

FILES = ("MANIFEST.json", "state.json", "part-0.json", "part-1.json", "part-0-0.safetensors", "part-1-0.safetensors")


def values(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal((40, 10))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints of two writers, at steps 1 and 2."""
    options: dict[str, Any] = {
        "nonce": "a",
        "keep": 3,
        "asynchronous": True,
        "producer": {},
        "report": lambda report: None,
    }
    savers = [Saver(str(tmp_path), writer=writer, writers=2, **options) for writer in (0, 1)]
    for step in (1, 2):
        for writer, saver in enumerate(savers):
            half = values(step)[20 * writer : 20 * writer + 20]
            saver.save(
                step, {"model": [Shard("w", "param", "float64", (40, 10), (20 * writer, 0), half)]}, {"at": step}
            )
        for saver in savers:
            saver.wait()
    assert sorted(os.listdir(tmp_path / "s00000002-a")) == sorted(FILES)
    return tmp_path


def assert_falls_back(root: Path, named: str) -> None:
    """The damaged step 2 is passed over, with the file named, and step 1 is read whole."""
    reader, passed_over = open_newest(str(root))
    assert reader is not None
    assert (reader.step, reader.state) == (1, {"at": 1})
    np.testing.assert_array_equal(reader.role("model").read("param", "w", (0, 0), (40, 10)), values(1))
    assert [Path(passed.folder).name for passed in passed_over] == ["s00000002-a"]
    assert named in passed_over[0].reason
    assert (root / "s00000002-a").exists(), "kept for inspection"


def test_every_flipped_bit_is_found_and_the_previous_checkpoint_is_used(
    root: Path, full_drills: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(0)
    places = [(name, place) for name in FILES for place in range((root / "s00000002-a" / name).stat().st_size)]
    flips = 10_000 if full_drills else 200
    for name, place in chance.choices(places, k=flips):
        path = root / "s00000002-a" / name
        sound = path.read_bytes()
        changed = bytearray(sound)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        assert_falls_back(root, name)
        path.write_bytes(sound)
    assert open_newest(str(root)).reader.step == 2  # type: ignore[union-attr]
    with capsys.disabled():
        print(f"\n{flips} flipped bits: {flips} found, and the file named")


def test_every_truncation_is_found_without_reading_contents(
    root: Path, full_drills: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    chance, cuts = random.Random(1), 200 if full_drills else 60
    for _ in range(cuts):
        name = chance.choice(FILES)
        path = root / "s00000002-a" / name
        sound = path.read_bytes()
        path.write_bytes(sound[: chance.randrange(len(sound))])
        assert newest(str(root)).step == 1  # type: ignore[union-attr]
        assert_falls_back(root, name)
        path.write_bytes(sound)
    with capsys.disabled():
        print(f"\n{cuts} truncations: {cuts} found, and the file named")


@pytest.mark.parametrize("name", [name for name in FILES if name != "MANIFEST.json"])
def test_a_missing_file_is_damage(root: Path, name: str) -> None:
    (root / "s00000002-a" / name).unlink()
    assert_falls_back(root, f"lacks {name}")


def test_without_a_manifest_there_is_no_checkpoint(root: Path) -> None:
    (root / "s00000002-a" / "MANIFEST.json").unlink()
    reader, passed_over = open_newest(str(root))
    assert reader is not None
    assert (reader.step, passed_over) == (1, [])
    with pytest.raises(CheckpointDamaged, match=r"lacks MANIFEST\.json"):
        CheckpointReader(root / "s00000002-a")


def test_stray_files_are_ignored(root: Path) -> None:
    for name in ("part-7-0.safetensors", "part-7.json", "MANIFEST.json.tmp", "x"):
        (root / "s00000002-a" / name).write_bytes(b"stray")
    (root / "s00000009-x").write_text("not a folder")
    (root / "s00000008-x").mkdir()
    reader, passed_over = open_newest(str(root))
    assert reader is not None
    assert (reader.step, passed_over) == (2, [])


def test_a_flip_is_found_by_the_rank_that_reads_the_file_and_by_no_other(root: Path) -> None:
    path = root / "s00000002-a" / "part-1-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    role = CheckpointReader(root / "s00000002-a").role("model")
    np.testing.assert_array_equal(role.read("param", "w", (5, 2), (15, 8)), values(2)[5:20, 2:])
    with pytest.raises(CheckpointDamaged, match=r"part-1-0\.safetensors is damaged: its SHA-256"):
        role.read("param", "w", (19, 0), (2, 1))


def test_the_manifest_of_another_step_or_another_run_is_damage(root: Path) -> None:
    shutil.copy(root / "s00000001-a" / "MANIFEST.json", root / "s00000002-a" / "MANIFEST.json")
    assert_falls_back(root, "its manifest is that of step 1")


def test_shards_of_two_saves_are_never_mixed(root: Path) -> None:
    name = "part-1-0.safetensors"
    shutil.copy(root / "s00000001-a" / name, root / "s00000002-a" / name)
    assert_falls_back(root, name)


def replace_with_link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def replace_with_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("replace", [replace_with_link, replace_with_pipe, replace_with_folder])
def test_only_regular_files_are_read(root: Path, replace: Callable[[Path], None], name: str) -> None:
    replace(root / "s00000002-a" / name)
    assert_falls_back(root, name)


def test_a_later_format_is_not_passed_over_silently(root: Path) -> None:
    path = root / "s00000002-a" / "MANIFEST.json"
    path.write_bytes(seal({**unseal(path.read_bytes(), ""), "format": FORMAT + 1}))
    with pytest.raises(CheckpointMismatch, match="install the version that wrote it"):
        open_newest(str(root))
    assert [found.step for found in list_checkpoints(str(root)).sound] == [1]


def test_a_box_that_its_file_does_not_hold_is_damage(root: Path) -> None:
    path = root / "s00000002-a" / "MANIFEST.json"
    document = unseal(path.read_bytes(), "")
    document["tensors"][0]["boxes"][0]["key"] = "t000009"
    path.write_bytes(seal(document))
    with pytest.raises(CheckpointDamaged, match="has no t000009"):
        CheckpointReader(root / "s00000002-a").role("model").read("param", "w", (0, 0), (1, 1))


def test_a_dtype_that_its_file_does_not_hold_is_damage(root: Path) -> None:
    path = root / "s00000002-a" / "MANIFEST.json"
    document = unseal(path.read_bytes(), "")
    document["tensors"][0]["dtype"] = "int64"
    path.write_bytes(seal(document))
    with pytest.raises(CheckpointDamaged, match="of int64"):
        CheckpointReader(root / "s00000002-a").role("model").read("param", "w", (0, 0), (1, 1))


def test_all_damaged_leaves_none_and_names_all(root: Path) -> None:
    for step in (1, 2):
        (root / f"s0000000{step}-a" / "state.json").write_text("{}")
    reader, passed_over = open_newest(str(root))
    assert reader is None
    assert [Path(passed.folder).name for passed in passed_over] == ["s00000002-a", "s00000001-a"]
    catalog = list_checkpoints(str(root))
    assert (catalog.sound, len(catalog.damaged)) == ([], 2)


def test_a_checkpoint_deleted_while_it_is_read_is_told_as_gone(root: Path) -> None:
    reader = CheckpointReader(root / "s00000002-a")
    shutil.rmtree(root / "s00000002-a")
    with pytest.raises(CheckpointError, match=r"lacks part-0-0\.safetensors"):
        reader.role("model").read("param", "w", (0, 0), (1, 1))
