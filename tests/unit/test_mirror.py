"""What one node's memory has lost comes back from another's, whole and unchanged, or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from unitrain.agent.mirror import Holder, Mirror, Order, Part, Unshared, arrange, missing, newest_whole, only_authentic
from unitrain.checkpoint import CheckpointReader
from unitrain.checkpoint.memory import MemoryFolder, Snapshots, whole_snapshots
from unitrain.shared_memory import make_memory
from unitrain.strategy import Shard

pytestmark = pytest.mark.fast
KEY, RANKS = b"k" * 64, 2


class Node:
    """One node's memory and mirror; its rank has the node's number."""

    def __init__(self, number: int, key: bytes = KEY) -> None:
        self.number, self.fd = number, make_memory(RANKS)
        self.mirror = Mirror(self.fd, RANKS, key)
        self.snapshots = Snapshots(self.fd, writer=number, writers=RANKS, nonce="a")

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.mirror.port

    def save(self, step: int) -> None:
        rows = np.full((1, 100_000), step, np.float32) + self.number
        shard = Shard("w", "param", "float32", (RANKS, 100_000), (self.number, 0), rows)
        self.snapshots.save(step, {"model": [shard]}, {"step": step})
        self.snapshots.close()

    def value(self, name: str) -> np.ndarray:
        (whole,) = [whole for whole in whole_snapshots(self.fd) if whole.name == name]
        reader = CheckpointReader(MemoryFolder(whole))
        reader.verify()
        return reader.role("model").read("param", "w", (0, 0), (RANKS, 100_000))

    def close(self) -> None:
        self.mirror.close()
        os.close(self.fd)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    made = [Node(number) for number in range(RANKS)]
    for node in made:
        node.mirror.send_on([node.number], None)
    yield made
    for node in made:
        node.close()


def arranged(nodes: list[Node], after: int = 0) -> str:
    return arrange(nodes[0].mirror, [node.address for node in nodes], KEY, after=after)


def until(holds: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_before_an_attempt_every_node_gets_the_newest_whole_snapshot(nodes: list[Node]) -> None:
    for node in nodes:
        node.save(3)
    nodes[1].save(6)  # rank 0 was killed before it had finished that step
    name = arranged(nodes)
    assert name == "memory:3:a"
    for node in nodes:
        assert [row[0] for row in node.value(name)] == [3, 4]
    assert arranged(nodes, after=3) == "", "the disk has that step"


def test_a_snapshot_goes_to_the_next_node_and_comes_back_when_its_own_is_lost(nodes: list[Node]) -> None:
    nodes[1].mirror.send_on([1], nodes[0].address)
    for step in (3, 6, 9):
        for node in nodes:
            node.save(step)
        until(lambda step=step: (1, step) in [(part.region, part.step) for part in nodes[0].mirror.parts()])
    nodes[1].close()
    nodes[1] = Node(1)
    name = arranged(nodes)
    assert name == "memory:9:a"
    assert [row[0] for row in nodes[1].value(name)] == [9, 10]


def test_what_a_rank_has_taken_back_does_not_come_back_from_a_copy(nodes: list[Node]) -> None:
    nodes[1].mirror.send_on([1], nodes[0].address)
    for node in nodes:
        node.save(3)
    until(lambda: len(nodes[0].mirror.parts()) == 2)
    nodes[1].snapshots.forget()
    assert arranged(nodes) == ""


def test_a_rank_that_ended_before_its_checksums_has_still_made_a_snapshot(nodes: list[Node]) -> None:
    from unitrain.shared_memory import HEADER, place_of

    for node in nodes:
        node.save(3)
    page = os.pread(nodes[1].fd, HEADER.size, place_of(1, 0))
    os.pwrite(nodes[1].fd, HEADER.pack(*HEADER.unpack(page)[:-1], 0), place_of(1, 0))
    assert [part.region for part in nodes[1].mirror.parts()] == []
    assert arranged(nodes) == "memory:3:a"


def test_a_copy_that_has_changed_is_not_taken(nodes: list[Node]) -> None:
    from unitrain.shared_memory import PAGE, place_of

    for node in nodes:
        node.save(3)
    os.pwrite(nodes[1].fd, b"\xff", place_of(1, 0) + PAGE + 17)
    with pytest.raises(Unshared, match="could not get all of the snapshot of step 3"):
        arranged(nodes)
    assert [part.region for part in nodes[0].mirror.parts()] == [0]


def test_a_node_that_is_gone_or_knows_another_key_leaves_the_disk(nodes: list[Node]) -> None:
    for node in nodes:
        node.save(3)
    stranger = Node(1, b"s" * 64)
    with pytest.raises(Unshared, match="cannot be had"):
        arrange(nodes[0].mirror, [nodes[0].address, stranger.address], KEY, after=0)
    stranger.close()
    with pytest.raises(Unshared, match="cannot be had"):
        arrange(nodes[0].mirror, [nodes[0].address, stranger.address], KEY, after=0)


def test_more_than_there_is_memory_for_is_not_fetched(nodes: list[Node]) -> None:
    order = Order(region=1, step=3, nonce="a", writers=RANKS, size=1 << 60, host="127.0.0.1", port=1)
    assert not nodes[0].mirror.fetch([order])


def part(region: int, step: int, writers: int = 3) -> Part:
    return Part(region=region, step=step, nonce="n", writers=writers, size=10)


def test_each_node_asks_for_what_it_lacks_where_it_is() -> None:
    holders = [Holder([part(0, 3), part(2, 3)], [0]), Holder([part(1, 3), part(0, 3)], [1]), Holder([], [])]
    holders = only_authentic(holders)
    assert newest_whole(holders, after=0) == (3, "n")
    assert newest_whole(holders[:2], after=3) is None
    orders = missing(holders, (3, "n"), [("a", 1), ("b", 2), ("c", 3)])
    assert [[(order.region, order.host) for order in wanted] for wanted in orders] == [
        [(1, "b")],
        [(2, "a")],
        [(0, "a"), (2, "a"), (1, "b")],
    ]
