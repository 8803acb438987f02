"""An attempt that was replaced publishes nothing, deletes nothing, and learns that it was."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unitrain.checkpoint import Saver, files, list_checkpoints, open_newest, take_over
from unitrain.checkpoint.fence import OWNER, Replaced
from unitrain.errors import CheckpointError
from unitrain.strategy import Shard

pytestmark = pytest.mark.fast


def saver(root: Path, nonce: str, **changes: Any) -> Saver:
    options: dict[str, Any] = {"writer": 0, "writers": 1, "keep": 1, "asynchronous": False, "producer": {}, **changes}
    return Saver(str(root), nonce=nonce, report=lambda report: None, **options)


def save(saver: Saver, step: int) -> None:
    data = np.full(4, step, dtype=np.float64)
    saver.save(step, {"model": [Shard("w", "param", "float64", (4,), (0,), data)]}, {"step": step})


def save_to_its_end(saver: Saver, step: int) -> None:
    save(saver, step)
    saver.wait()


def saved(root: Path) -> list[int]:
    return [found.step for found in list_checkpoints(str(root)).sound]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_replaced_attempt_publishes_and_deletes_nothing(tmp_path: Path, asynchronous: bool) -> None:
    take_over(str(tmp_path), "old")
    old = saver(tmp_path, "old", asynchronous=asynchronous)
    save_to_its_end(old, 1)
    take_over(str(tmp_path), "new")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Replaced, match="attempt old was replaced by attempt new"):
        save_to_its_end(old, 2)
    assert sorted(tmp_path.rglob("*")) == before
    save(saver(tmp_path, "new"), 2)
    assert saved(tmp_path) == [2]


@pytest.mark.parametrize("moment", ["part", "manifest", "published"])
def test_one_that_is_replaced_in_the_middle_of_a_save_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    take_over(str(tmp_path), "old")
    old = saver(tmp_path, "old")
    save(old, 1)
    publish = files.LocalFolder.publish

    def publishing(folder: files.LocalFolder, name: str, data: bytes) -> None:
        stops = {"part": "part-0.json", "manifest": "MANIFEST.json", "published": "MANIFEST.json"}[moment]
        if name != stops:
            publish(folder, name, data)
            return
        monkeypatch.undo()
        if moment == "published":
            publish(folder, name, data)
        take_over(str(tmp_path), "new")  # the old attempt was asleep until here
        if moment != "published":
            publish(folder, name, data)

    monkeypatch.setattr(files.LocalFolder, "publish", publishing)
    with pytest.raises((Replaced, CheckpointError)):
        save_to_its_end(old, 2)
    expected = [1, 2] if moment == "published" else [1]
    assert saved(tmp_path) == expected, "what was published before the other looked is seen, and never deleted"
    newest = open_newest(str(tmp_path))
    assert newest.reader is not None
    assert (newest.reader.step, newest.passed_over) == (expected[-1], [])


def test_an_attempt_that_is_replaced_while_it_writes_leaves_nothing_damaged(tmp_path: Path) -> None:
    for number in range(20):
        root = tmp_path / str(number)
        take_over(str(root), "old")
        old = saver(root, "old", asynchronous=True)
        save(old, 1)
        time.sleep(number * 0.002)
        take_over(str(root), "new")
        with contextlib.suppress(CheckpointError):
            old.wait()
        assert saved(root) in ([], [1])
        assert list_checkpoints(str(root)).damaged == []


def test_a_disk_that_is_too_full_to_take_over_leaves_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_over(str(tmp_path), "old")

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"could not be taken over: OSError: .*No space left"):
            take_over(str(tmp_path), "new")
    assert not (tmp_path / OWNER).exists()
    save(saver(tmp_path, "new"), 1)
    assert saved(tmp_path) == [1]
