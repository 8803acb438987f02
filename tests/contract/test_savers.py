"""A save that is cut off anywhere leaves a checkpoint that loads, whole; and the check can tell one that does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unitrain.checkpoint import Saver, open_newest
from unitrain.strategy import Shard
from unitrain.testing.crash import survived_crashes

VALUES = {1: np.arange(6, dtype=np.float32), 2: np.arange(6, dtype=np.float32) * 10}


def save(root: Path, step: int, nonce: str = "c0ffee") -> None:
    saver = Saver(
        str(root), writer=0, writers=1, nonce=nonce, keep=1, asynchronous=False, producer={}, report=lambda report: None
    )
    shard = Shard("weight", "param", "float32", (6,), (0,), VALUES[step])
    saver.save(step, {"model": [shard]}, {"step": step})
    saver.wait()
    saver.close()


def save_in_place(root: Path, step: int) -> None:
    """What a careless saver does: overwrite the newest checkpoint's files one after the other."""
    fresh = root.parent / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    save(fresh, step)
    (source,) = fresh.iterdir()
    (target,) = root.iterdir()
    for file in sorted(source.iterdir()):
        (target / file.name).write_bytes(file.read_bytes())


def check(root: Path) -> None:
    found = open_newest(str(root)).reader
    assert found is not None, "no checkpoint is left"
    value = found.role("model").read("param", "weight", (0,), (6,))
    np.testing.assert_array_equal(value, VALUES[found.state["step"]])


def crash(tmp_path: Path, saves: Callable[[Path, int], Any]) -> int:
    root = tmp_path / "checkpoints"
    save(root, 1, nonce="000001")
    before = tmp_path / "before"
    shutil.copytree(root, before)

    def checked() -> None:
        check(root)
        shutil.rmtree(root)
        shutil.copytree(before, root)

    return survived_crashes(lambda: saves(root, 2), checked)


def test_a_save_cut_off_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    assert crash(tmp_path, save) > 10


def test_a_save_that_overwrites_the_newest_checkpoint_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no checkpoint is left"):
        crash(tmp_path, save_in_place)


def test_the_check_notices_mixed_state(tmp_path: Path) -> None:
    def mixing(root: Path, step: int) -> None:
        save(root, step)
        raise SystemExit(3)

    with pytest.raises(AssertionError, match="exit code"):
        crash(tmp_path, mixing)
