"""When to log, evaluate and save."""

from __future__ import annotations

import pytest

from unitrain.policy import due

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("every", "steps", "wanted"),
    [
        (1, 4, [1, 2, 3, 4]),
        (3, 10, [3, 6, 9, 10]),
        (5, 10, [5, 10]),
        (20, 10, [10]),
        (None, 10, [10]),
        (0, 10, []),
        (1, 0, []),
        (None, 0, []),
    ],
)
def test_it_happens_every_so_many_steps_and_at_the_end(every: int | None, steps: int, wanted: list[int]) -> None:
    assert [step for step in range(steps + 1) if due(step, every, steps)] == wanted


def test_a_run_that_was_made_shorter_is_past_its_end_and_nothing_is_due_there() -> None:
    assert not due(12, None, 10)
