"""Ranks agree on the step after which they stop, whoever got the signal."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unitrain.stopping import ASK_SECONDS, Agreement, StopSignals
from unitrain.world import World

pytestmark = pytest.mark.fast


class Ranks:
    """Ranks of one process: rank 0 comes to each question first, and the others hear its answer."""

    def __init__(self, folder: Path, size: int) -> None:
        self.asked = 0
        self.answers: list[str] = []
        self.members = [Agreement(World(rank=rank, size=size), self.share(rank), folder) for rank in range(size)]

    def share(self, rank: int) -> Callable[[str], str]:
        def exchange(text: str) -> str:
            if rank == 0:
                self.answers.append(text)
                self.asked += 1
            return self.answers[-1]

        return exchange

    def stop(self, step: int, caught: dict[int, int]) -> set[int]:
        return {member.stop(step, caught.get(rank, 0)) for rank, member in enumerate(self.members)}


@pytest.mark.parametrize("rank", [0, 2])
def test_all_ranks_stop_after_the_same_step_whoever_got_the_signal(tmp_path: Path, rank: int) -> None:
    ranks = Ranks(tmp_path, 3)
    found = []
    for step in range(60):
        time.sleep(0.001)
        answers = ranks.stop(step, {rank: signal.SIGTERM} if step >= 20 else {})
        assert len(answers) == 1, "ranks disagree"
        found.append(answers.pop())
        if found[-1]:
            break
    assert found[-1] == signal.SIGTERM
    assert 20 <= len(found) - 1 < 60


def test_ranks_ask_seldom_where_steps_are_short(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    began = time.monotonic()
    for step in range(400):
        time.sleep(0.002)
        ranks.stop(step, {})
    seconds = time.monotonic() - began
    assert ranks.asked < 12 + 3 * seconds / ASK_SECONDS


def test_a_rank_that_is_alone_stops_at_once(tmp_path: Path) -> None:
    alone = Agreement(World(), lambda text: text, tmp_path)
    assert [alone.stop(3, 0), alone.stop(4, signal.SIGUSR1)] == [0, signal.SIGUSR1]


def test_a_request_of_an_earlier_attempt_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("15")
    assert Ranks(tmp_path, 2).stop(0, {}) == {0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_only_noted_and_the_handlers_of_before_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # one Ctrl-C may arrive twice
        assert signals.caught == number
    assert signal.getsignal(number) == before


def test_outside_the_main_thread_no_signal_is_caught() -> None:
    found = []

    def enter() -> None:
        with StopSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
