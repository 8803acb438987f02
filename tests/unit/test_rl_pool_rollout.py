"""Steps over a pool of actors, played by a pool that answers at once: which weights draw what, and what is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from unitrain.data.records import RecordsData
from unitrain.rl.dispatch import Call, GivenUp
from unitrain.rl.policy_torch import PPO
from unitrain.rl.prompts import Request, requests
from unitrain.rl.recipe import rl_recipe
from unitrain.rl.rollout_pool_torch import PoolRollout
from unitrain.rl.rollout_worker import Answers, PromptsFailed
from unitrain.rl.sampler import Weights

pytestmark = pytest.mark.fast

PROMPTS, EACH, STEPS = 5, 2, 6
RECORDS = RecordsData(path="unitrain.rl.examples:letters", seq_len=10).open("train")
assert RECORDS is not None


class Pool:
    """Answers with the weights that a call asks for; gives up the places in `hopeless`."""

    replaced, loading = 0, False

    def __init__(self, hopeless: tuple[int, ...] = ()) -> None:
        self.hopeless = hopeless
        self.versions: list[int] = []
        self.asked: list[Call] = []
        self.open: list[Call] = []
        self.prompts = RECORDS.prompt

    def publish(self, weights: Weights) -> None:
        self.versions.append(weights.version)

    def send(self, version: int) -> None:
        assert version in self.versions and not self.open
        self.loading = True

    def dispatch(self, calls: list[Call]) -> None:
        self.open += calls
        self.asked += calls

    def forget(self) -> None:
        self.open = []

    @property
    def busy(self) -> bool:
        return bool(self.open)

    def poll(self, seconds: float) -> list[Any]:
        if self.loading:
            self.loading = False
            return []
        call = self.open.pop()  # the latest first: order must not matter
        found: list[Any] = [GivenUp(r, "no") for r in call.requests if r.place in self.hopeless]
        kept = tuple(r for r in call.requests if r.place not in self.hopeless)
        rows = len(kept) * EACH
        if kept:
            tokens = np.array([[97 + r.place, 10] for r in kept for _ in r.indices])
            lengths, ended = np.full(rows, 2), np.ones(rows, dtype=bool)
            answers = Answers(call.version, 0, tokens, np.zeros((rows, 2), np.float32), lengths, ended, 0.5)
            found.append((call._replace(requests=kept), answers))
        return found


def of_step(step: int) -> list[Request]:
    return requests(1, step, prompts=PROMPTS, samples=EACH, size=26)


def rollout(pool: Pool, told: list[dict[str, Any]], **keys: Any) -> PoolRollout:
    given = {"rollout": {"actors": 1, "prompts_per_call": 2, **keys.pop("rollout", {})}, **keys}
    options = rl_recipe({"sampling": {"max_tokens": 2}, **given}, PPO.defaults)
    outbox: Any = SimpleNamespace(gather=lambda version: Weights(version, {}, {}, {}), again=lambda: None)
    rows: Any = SimpleNamespace(rank=0, size=1, summed=lambda array: array)
    return PoolRollout(
        options, outbox, rows, lambda text: text, pool, None,
        prompts=PROMPTS, requests=of_step, steps=STEPS, beat=lambda: None,
        tell=lambda event, **facts: told.append({"event": event, **facts}),
    )  # fmt: skip


def take(found: PoolRollout, step: int) -> list[Any]:
    return found.samples(of_step(step), RECORDS, found.options.sampling, version=step)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_each_step_is_drawn_by_weights_that_many_steps_older_and_nothing_after_the_last(staleness):
    pool = Pool()
    ahead = rollout(pool, [], max_staleness=staleness)
    for step in range(STEPS):
        samples = take(ahead, step)
        assert [(s.place, s.index) for s in samples] == [(r.place, i) for r in of_step(step) for i in r.indices]
        assert {s.version for s in samples} == {max(step - staleness, 0)}
        assert all(int(s.tokens[0]) == 97 + s.place for s in samples)
    assert pool.versions == list(range(STEPS)) and not pool.open
    assert sorted({call.step for call in pool.asked}) == list(range(STEPS))
    assert sum(len(call.requests) for call in pool.asked) == STEPS * PROMPTS  # nothing twice
    assert max(call.step - call.version for call in pool.asked) == min(staleness, STEPS - 1)


def test_prompts_that_are_given_up_are_left_out_until_they_are_too_many():
    told: list[dict[str, Any]] = []
    found = take(rollout(Pool((1, 4)), told, rollout={"max_failures": 2}), 0)
    assert sorted({sample.place for sample in found}) == [0, 2, 3]
    assert [(each["event"], each["error"]) for each in told] == [("prompt_dropped", "no")] * 2
    with pytest.raises(PromptsFailed, match=r"prompt 1 of step 1 has no answer: no; 2 of 5 .*, at most 1"):
        take(rollout(Pool((1, 4)), [], rollout={"max_failures": 1}), 0)
    with pytest.raises(PromptsFailed, match="no prompt of step 1 has an answer"):
        take(rollout(Pool((0, 1, 2, 3, 4)), [], rollout={"max_failures": 5}), 0)


@pytest.mark.parametrize("keep", ["save", "requeue"])
def test_what_is_ahead_is_saved_or_asked_for_again(keep):
    pool = Pool()
    before = rollout(pool, [], max_staleness=2, buffer=keep)
    for step in range(3):
        take(before, step)
    state = before.state(3, keep)
    assert len(state["groups"]) == (2 * PROMPTS if keep == "save" else 0)
    again = Pool()
    after = rollout(again, [], max_staleness=2)
    after.load(3, state)
    versions = [take(after, step)[0].version for step in (3, 4, 5)]
    assert versions == ([1, 2, 3] if keep == "save" else [3, 3, 3])
    assert {call.step for call in again.asked} == ({5} if keep == "save" else {3, 4, 5})


def test_saved_samples_that_are_too_old_for_the_resumed_run_are_dropped_reported_and_drawn_again():
    before = rollout(Pool(), [], max_staleness=2)
    for step in range(3):
        take(before, step)
    state = before.state(3, "save")
    told: list[dict[str, Any]] = []
    pool = Pool()
    after = rollout(pool, told, max_staleness=1)
    after.load(3, state)
    assert told[0]["event"] == "rollout_dropped" and told[0]["groups"] == 2 * PROMPTS
    assert [take(after, step)[0].version for step in (3, 4)] == [3, 3]


def test_after_a_rollback_nothing_from_before_counts():
    pool = Pool()
    found = rollout(pool, [], max_staleness=2)
    for step in range(4):
        take(found, step)
    found.load(1, None)
    assert [take(found, step)[0].version for step in (1, 2, 3)] == [1, 1, 1]
    assert [take(found, step)[0].version for step in (4, 5)] == [2, 3]
