"""When a run is started again and when a rank counts as hung, decided from lists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import pytest

from unitrain.agent.hang import FLOOR_SECONDS, TIMES_THE_LONGEST, Hang, Watch
from unitrain.agent.restart import Decision, Fault, decide, in_vain
from unitrain.heartbeat import Heartbeat, Heartbeats, Phase, Pulse

pytestmark = pytest.mark.fast

KILLED = Fault(exit_code=-9)
MOVED = Fault(exit_code=-9, finished=30, progress=True)
RAISED = Fault(raised=True, finished=3)


def test_a_killed_rank_is_replaced_at_once_and_the_next_ones_after_a_pause() -> None:
    waits = [decide([MOVED, *[KILLED] * count], 9) for count in range(8)]
    assert waits == [Decision(True, after_seconds=seconds) for seconds in (0, 0, 1, 2, 4, 8, 16, 30)]


@pytest.mark.parametrize("fault", [KILLED, RAISED, Fault(exit_code=3)])
def test_attempts_without_progress_end_the_run(fault: Fault) -> None:
    assert [decide([fault] * count, 3).restart for count in (1, 2, 3)] == [True, True, False]
    assert decide([fault] * 3, 3).exit_code == 93


def test_a_newer_checkpoint_starts_the_count_anew() -> None:
    faults = [KILLED, KILLED, MOVED, KILLED, KILLED]
    assert [in_vain(faults[:count]) for count in range(1, 6)] == [1, 2, 0, 1, 2]
    assert decide(faults, 3).restart
    assert decide([MOVED] * 1000, 1).restart, "a run that gets on may fail as often as it likes"


def test_a_bad_recipe_and_a_mistake_in_the_first_step_are_final() -> None:
    assert decide([Fault(exit_code=78, raised=True, finished=3)], 3) == Decision(False, exit_code=78)
    assert decide([Fault(raised=True)], 3) == Decision(False, exit_code=70)
    assert decide([MOVED, Fault(raised=True)], 3) == Decision(False, exit_code=70)
    assert decide([KILLED], 3).restart, "but who was killed before the first step made no mistake"


@pytest.mark.parametrize("fault", [KILLED, RAISED, MOVED])
def test_no_restarts_means_none(fault: Fault) -> None:
    assert decide([fault], 0) == Decision(False, exit_code=70)


def hangs(
    beats: Iterable[tuple[float, int, Pulse]], at: Sequence[float], hang_seconds: float | None = None
) -> list[Hang | None]:
    """What a watch says at these times, after (time, rank, pulse) until then."""
    watch, waiting = Watch(hang_seconds), sorted(beats)
    said = []
    for now in at:
        while waiting and waiting[0][0] <= now:
            time, rank, pulse = waiting.pop(0)
            watch.look(rank, pulse, time)
        said.append(watch.hang([0, 1], {}, now))
    return said


def pulse(beats: int, step: int, phase: Phase = Phase.STEP, finished: int | None = None) -> Pulse:
    return Pulse(beats, phase, step, step if finished is None else finished, 0, None)


def steps(rank: int, count: int, seconds: float) -> list[tuple[float, int, Pulse]]:
    return [(step * seconds, rank, pulse(step + 1, step)) for step in range(count)]


def test_a_rank_hangs_when_a_step_takes_many_times_the_longest() -> None:
    slow = 2 * FLOOR_SECONDS / TIMES_THE_LONGEST
    beats = [*steps(0, 10, slow), *steps(1, 10, slow)]
    limit = TIMES_THE_LONGEST * slow
    early, late = hangs(beats, [9 * slow + limit - 0.1, 9 * slow + limit + 0.1])
    assert early is None
    assert late is not None
    assert "no progress in step 10" in str(late)


def test_fast_steps_may_pause_for_as_long_as_a_busy_machine_holds_them_up() -> None:
    beats = [*steps(0, 100, 0.01), *steps(1, 100, 0.01)]
    assert [hang is not None for hang in hangs(beats, [FLOOR_SECONDS, 1 + FLOOR_SECONDS])] == [False, True]


def test_the_rank_that_is_behind_is_to_blame_and_not_those_that_wait_for_it() -> None:
    for culprit in (0, 1):
        beats = [*steps(culprit, 5, 1.0), *steps(1 - culprit, 6, 1.0)]
        (hang,) = hangs(beats, [100.0])
        assert hang is not None
        assert (hang.rank, hang.step) == (culprit, 4)
    tied = [(0.0, rank, pulse(1, 0)) for rank in (0, 1)]
    tied += [(2.0, 0, pulse(2, 1)), (1.0, 1, pulse(2, 1))]
    (hang,) = hangs(tied, [100.0])
    assert hang is not None
    assert hang.rank == 1, "the one that has been silent for longer"


@pytest.mark.parametrize(
    "long",
    [pulse(2, 0), pulse(2, 5, Phase.EVALUATING), pulse(2, 5, Phase.SAVING), pulse(2, 0, Phase.STARTING)],
    ids=["first step", "evaluation", "save", "start"],
)
@pytest.mark.parametrize("hang_seconds", [None, 5.0])
def test_what_is_long_and_seldom_has_a_larger_limit(long: Pulse, hang_seconds: float | None) -> None:
    beats = [(0.0, rank, pulse(1, 0)) for rank in (0, 1)] + [(1.0, rank, long) for rank in (0, 1)]
    assert hangs(beats, [600.0, 4000.0], hang_seconds)[0] is None
    assert hangs(beats, [600.0, 4000.0], hang_seconds)[1] is not None


def test_the_users_limit_takes_the_place_of_the_measured_one() -> None:
    beats = [*steps(0, 10, 1.0), *steps(1, 10, 1.0)]
    assert [hang is not None for hang in hangs(beats, [9 + 1.9, 9 + 2.1], hang_seconds=2.0)] == [False, True]


def test_finishing_and_ranks_that_never_beat_are_not_watched() -> None:
    last = [(0.0, rank, pulse(2, 5, Phase.FINISHING)) for rank in (0, 1)]
    never = [(0.0, rank, pulse(0, 0, Phase.STARTING)) for rank in (0, 1)]
    assert hangs(last, [1e6]) == hangs(never, [1e6]) == [None]


def test_a_rank_and_its_agent_share_a_heartbeat_without_system_calls() -> None:
    shared = Heartbeats(2)
    assert shared.pulse(1) == Pulse(0, Phase.STARTING, 0, 0, None, None)
    rank = Heartbeat.of(f"{shared.fd}:1")
    before = os.times().system
    rank.began(7)
    rank.beat(Phase.STEP, 7)
    for step in range(8, 100_000):
        rank.finished()
        rank.beat(Phase.STEP, step)
    assert os.times().system - before < 0.05
    rank.saved(90)
    assert shared.pulse(1) == Pulse(99_993, Phase.STEP, 99_999, 99_992, 7, 90)
    assert shared.pulse(0).beats == 0
    shared.close()
