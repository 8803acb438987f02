"""How many ranks a node runs with, decided from a file and from lists of faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from unitrain.agent.restart import Fault
from unitrain.agent.slots import Slots, starts_fail
from unitrain.heartbeat import Heartbeat, Heartbeats
from unitrain.stopping import RESIZE, Agreement
from unitrain.world import World

pytestmark = pytest.mark.fast


def test_the_file_says_how_many_and_a_torn_one_changes_nothing(tmp_path: Path) -> None:
    slots, path = Slots(tmp_path, least=2, most=4), tmp_path / "slots"
    found = [slots.fitting(0)]
    for text in ("3\n", "", "two", "2", "1", "-5", "9"):
        path.write_text(text)
        found.append(slots.fitting(0))
    path.unlink()
    assert [*found, slots.fitting(0)] == [4, 3, 3, 3, 2, 2, 2, 4, 4]


def test_a_run_of_a_fixed_size_reads_no_file(tmp_path: Path) -> None:
    (tmp_path / "slots").write_text("1")
    assert Slots(tmp_path, least=4, most=4).fitting(0) == 4


def test_a_lost_slot_is_tried_again_after_a_pause_that_doubles(tmp_path: Path) -> None:
    slots = Slots(tmp_path, least=1, most=2)
    assert slots.lose(100)
    assert not slots.lose(100), "one rank must stay"
    assert [slots.fitting(now) for now in (100, 159, 160)] == [1, 1, 2]
    assert slots.lose(200)
    assert [slots.fitting(now) for now in (319, 320)] == [1, 2]


def test_a_slot_is_lost_when_its_rank_ends_twice_in_a_row_before_its_first_step() -> None:
    dead = Fault(exit_code=-9, rank=1)
    assert starts_fail([dead, dead])
    assert not starts_fail([dead])
    assert not starts_fail([dead, Fault(exit_code=-9, rank=0)])
    assert not starts_fail([dead, Fault(exit_code=-9, rank=1, finished=3)])
    assert not starts_fail([dead, Fault(raised=True, rank=1)]), "an exception is a mistake in the code"


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_leave_together_for_a_resize(tmp_path: Path, size: int) -> None:
    beats = Heartbeats(1)
    world = World(size=size, heartbeat=Heartbeat.of(f"{beats.fd}:0"))
    answers: list[str] = []

    def share(text: str) -> str:
        answers.append(text)
        return text

    first = Agreement(world, share, tmp_path)
    assert first.stop(0, 0) == 0
    beats.ask_to_leave()
    assert RESIZE in [first.stop(step, 0) for step in range(1, 5)]
    if size == 2:
        assert Agreement(World(rank=1, size=2), lambda _: answers[-1], tmp_path).stop(4, 0) == RESIZE
