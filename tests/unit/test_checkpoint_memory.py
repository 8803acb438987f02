"""Snapshots in memory: whole or passed over, read as checkpoints are, and never both buffers at risk."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from unitrain.checkpoint import CheckpointReader
from unitrain.checkpoint.memory import MemoryFolder, Snapshots, whole_snapshots
from unitrain.errors import CheckpointDamaged, CheckpointError
from unitrain.shared_memory import make_memory
from unitrain.strategy import Shard

pytestmark = pytest.mark.fast

RANKS, ROWS = 2, 60_000


@pytest.fixture
def fd() -> Iterator[int]:
    found = make_memory(RANKS)
    yield found
    os.close(found)


def values(step: int) -> NDArray[np.float32]:
    return np.random.default_rng(step).standard_normal((ROWS, 3), dtype=np.float32)


def shards(step: int, rank: int) -> list[Shard]:
    """Each rank holds its half of one tensor; the first also a scalar."""
    data, half = values(step), ROWS // 2
    mine = Shard("w", "param", "float32", data.shape, (rank * half, 0), data[rank * half : (rank + 1) * half])
    count = Shard("count", "buffer", "int64", (), (), np.array(step))
    return [mine, count] if rank == 0 else [mine]


def ranks(fd: int, nonce: str = "a") -> list[Snapshots]:
    return [Snapshots(fd, writer=rank, writers=RANKS, nonce=nonce) for rank in range(RANKS)]


def save(of_ranks: list[Snapshots], step: int, *only: int) -> None:
    for rank in only or range(RANKS):
        of_ranks[rank].save(step, {"model": shards(step, rank)}, {"step": step, "rank": rank})
        of_ranks[rank].close()


def steps(fd: int) -> list[int]:
    return [whole.step for whole in whole_snapshots(fd)]


def test_what_the_ranks_copied_is_read_as_one_checkpoint(fd: int) -> None:
    of_ranks = ranks(fd)
    for step in (3, 6, 9):
        save(of_ranks, step)
    assert steps(fd) == [9, 6]
    for whole in whole_snapshots(fd):
        reader = CheckpointReader(MemoryFolder(whole))
        reader.verify()
        assert (reader.step, reader.state) == (whole.step, {"step": whole.step, "rank": 0})
        held = reader.role("model")
        np.testing.assert_array_equal(held.read("param", "w", (0, 0), (ROWS, 3)), values(whole.step))
        assert held.read("buffer", "count", (), ()) == whole.step
    assert MemoryFolder(whole_snapshots(fd)[0]).names() == [
        "MANIFEST.json",
        "part-0-0.safetensors",
        "part-1-0.safetensors",
        "state.json",
    ]


def test_a_snapshot_that_not_all_ranks_have_counts_for_nothing_and_costs_no_older_one(fd: int) -> None:
    of_ranks = ranks(fd)
    save(of_ranks, 3)
    save(of_ranks, 6)
    save(of_ranks, 9, 0)
    assert steps(fd) == [6]
    again = ranks(fd, "b")  # the next attempt goes on from step 6
    save(again, 9, 0, 1)
    assert steps(fd) == [9, 6]
    again[0].forget()
    assert steps(fd) == []


def test_another_attempt_spares_the_newest_snapshot(fd: int) -> None:
    of_ranks = ranks(fd)
    for step in (3, 6, 9):
        save(of_ranks, step)
    save(ranks(fd, "b"), 12, 1)
    assert steps(fd) == [9]


@pytest.mark.parametrize("seed", range(8))
def test_a_writer_that_is_killed_anywhere_leaves_a_whole_snapshot(fd: int, seed: int) -> None:
    of_ranks = ranks(fd)
    save(of_ranks, 1)
    save(of_ranks, 2)
    pid = os.fork()
    if pid == 0:
        try:
            step = 3
            while True:
                save(of_ranks, step)
                step += 1
        finally:
            os._exit(1)
    time.sleep(0.004 + 0.003 * seed)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    newest = whole_snapshots(fd)[0]
    reader = CheckpointReader(MemoryFolder(newest))
    reader.verify()
    assert newest.step >= 2
    np.testing.assert_array_equal(reader.role("model").read("param", "w", (0, 0), (ROWS, 3)), values(newest.step))


@pytest.mark.parametrize("place", [1000, 4 * 3 * ROWS // 2 + 8 + 20])
def test_changed_bytes_are_found(fd: int, place: int) -> None:
    save(ranks(fd), 3)
    position = mmap.PAGESIZE + place  # in the tensors of the first rank, and in the index behind them
    byte = os.pread(fd, 1, position)[0]
    os.pwrite(fd, bytes([byte ^ 4]), position)
    found = whole_snapshots(fd)
    if found:  # the index is sound
        with pytest.raises(CheckpointDamaged, match="SHA-256"):
            CheckpointReader(MemoryFolder(found[0])).verify()


def test_a_snapshot_with_a_gap_is_refused(fd: int) -> None:
    of_ranks = ranks(fd)
    of_ranks[0].save(3, {"model": shards(3, 0)}, {})
    of_ranks[1].save(3, {"model": shards(3, 1)[:0]}, {})
    with pytest.raises(CheckpointError, match="its boxes hold"):
        MemoryFolder(whole_snapshots(fd)[0])
