"""Learning rates are pure functions of the step: their shapes, their ends, and nothing in between that jumps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unitrain.recipe import SCHEDULES, ScheduleRecipe
from unitrain.schedule import learning_rate

pytestmark = pytest.mark.fast

TOP = 0.3


def rates(steps: int, **schedule: Any) -> list[float]:
    recipe = ScheduleRecipe(**schedule)
    return [learning_rate(recipe, step, steps, TOP) for step in range(steps)]


def test_a_constant_rate_is_constant_after_its_warm_up() -> None:
    assert rates(4, name="constant") == [TOP] * 4
    assert rates(6, name="constant", warmup_steps=4) == pytest.approx([TOP / 4, TOP / 2, TOP * 3 / 4, TOP, TOP, TOP])


def test_a_linear_rate_falls_by_the_same_amount_each_step() -> None:
    assert rates(5, name="linear", warmup_steps=1) == pytest.approx([TOP, TOP, TOP * 3 / 4, TOP / 2, TOP / 4])
    falls = [before - after for before, after in pairwise(rates(50, name="linear", final=0.1))]
    assert falls == pytest.approx([0.9 * TOP / 50] * 49)


def test_a_cosine_rate_is_half_way_in_the_middle() -> None:
    found = rates(100, name="cosine", final=0.2)
    assert found[0] == TOP
    assert found[50] == pytest.approx(TOP * 0.6)
    assert found[25] == pytest.approx(TOP * (0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2))


def test_wsd_stays_at_the_top_until_its_last_tenth() -> None:
    found = rates(110, name="wsd", warmup_steps=10)
    assert found[9:101] == [TOP] * 92
    assert found[100:] == pytest.approx([TOP * left / 10 for left in range(10, 0, -1)])
    assert rates(110, name="wsd", decay_steps=50)[:61] == [TOP] * 61


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_shorter_decay_ends_earlier_and_stays(name: str) -> None:
    found = rates(40, name=name, warmup_steps=5, decay_steps=10, final=0.1)
    assert found[15:] == pytest.approx([TOP * 0.1] * 25)
    assert found[14] > TOP * 0.1


def test_a_run_that_goes_on_beyond_its_steps_stays_at_the_end() -> None:
    for name in ("linear", "cosine", "wsd"):
        assert learning_rate(ScheduleRecipe(name=name, final=0.1), 500, 100, TOP) == pytest.approx(0.1 * TOP)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    decay=st.none() | st.integers(1, 80),
    final=st.floats(0, 1),
)
def test_every_schedule_rises_to_the_top_and_then_never_rises_again(
    name: str, steps: int, warmup: int, decay: int | None, final: float
) -> None:
    found = rates(steps, name=name, warmup_steps=warmup, decay_steps=decay, final=final)
    rise, rest = found[:warmup], found[warmup:]
    assert rise == pytest.approx([TOP * (step + 1) / warmup for step in range(len(rise))])
    assert rest == sorted(rest, reverse=True)
    assert all(TOP * final * (1 - 1e-12) <= rate <= TOP for rate in rest)
    if rest:
        assert rest[0] == TOP
