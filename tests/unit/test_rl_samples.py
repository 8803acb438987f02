"""Samples as arrays, their seeds, which prompts a step takes, and the buffer between generation and training."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from unitrain.errors import RecipeError, UnitrainError
from unitrain.rl.buffer import Buffer, Group
from unitrain.rl.prompts import minibatches, requests
from unitrain.rl.samples import (
    Sample,
    collate,
    collected,
    scored_mask,
    seed_of,
    spread,
    token_rewards,
    trained_mask,
    uniforms,
)

pytestmark = pytest.mark.fast


def sample(prompt: int = 3, answer: int = 4, *, at: int = 0, **changes: Any) -> Sample:
    """A sample of so many prompt and response tokens."""
    draw = np.random.default_rng(answer)
    values: dict[str, Any] = {
        "step": 0,
        "place": at,
        "prompt": 10 + at,
        "index": 0,
        "version": 0,
        "prompt_tokens": np.arange(1, prompt + 1),
        "tokens": np.arange(50, 50 + answer),
        "ended": True,
        "logprobs": -draw.random(answer).astype(np.float32),
        "reward": float(answer),
    }
    return Sample(**{**values, **changes})


def test_collated_samples_are_padded_and_each_number_stands_where_its_token_is_the_target() -> None:
    samples = [sample(3, 4), sample(1, 2, at=1), sample(2, 3, at=1, mask=np.array([True, False, True]))]
    arrays = collate(samples, pad=99, length=7)
    assert arrays["tokens"].shape == arrays["targets"].shape == (3, 7)
    assert arrays["tokens"][1].tolist() == [1, 50, 51, 99, 99, 99, 99]
    assert arrays["targets"][1].tolist() == [50, 51, 99, 99, 99, 99, 99]
    assert arrays["targets"][0][arrays["mask"][0]].tolist() == [50, 51, 52, 53]
    assert arrays["targets"][2][arrays["mask"][2]].tolist() == [50, 52]
    assert arrays["groups"].tolist() == [0, 1, 1]
    assert "old" not in arrays
    for row, each in enumerate(samples):
        own = arrays["rollout"][row][arrays["mask"][row]]
        assert own.tolist() == each.logprobs[each.chosen].tolist()
    for found, each in zip(collected(samples, arrays["rollout"]), samples, strict=True):
        assert found.tolist() == each.logprobs.tolist()
    both = [each.logprobs * 2 for each in samples]
    assert spread(samples, both, 7, np.float32).sum() == pytest.approx(sum(each.sum() for each in both))
    assert collate(samples)["tokens"].shape == (3, 6)


def test_the_reward_stands_on_the_last_token_that_the_policy_chose() -> None:
    """Ended, cut, with a last token that somebody else wrote, and without a reward."""
    samples = [
        sample(2, 3, reward=5.0),
        sample(2, 4, reward=7.0, ended=False),
        sample(2, 3, reward=2.0, mask=np.array([True, True, False])),
        sample(2, 2, reward=None),
    ]
    arrays = collate(samples)
    rewards = token_rewards(arrays["rewards"], arrays["mask"])
    assert rewards.tolist() == [[0, 0, 0, 5, 0], [0, 0, 0, 0, 7], [0, 0, 2, 0, 0], [0, 0, 0, 0, 0]]
    assert scored_mask(arrays).any(axis=1).tolist() == [True, True, True, False]
    assert trained_mask(arrays).any(axis=1).tolist() == [True, True, True, False]
    assert trained_mask(arrays, mask_truncated=True).any(axis=1).tolist() == [True, False, True, False]


def test_a_sample_survives_json_bit_by_bit() -> None:
    one = sample(
        3, 5, old=np.array([0.1, -1 / 3, 1e-30, 2, 3], np.float32), parts={"exact": 0.1}, mask=np.ones(5, bool)
    )
    again = Sample.of_state(json.loads(json.dumps(one.state())))
    for name in Sample.__dataclass_fields__:
        before, after = getattr(one, name), getattr(again, name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype and before.tobytes() == after.tobytes()
        else:
            assert before == after


def test_a_sample_s_numbers_depend_on_its_seed_and_position_alone() -> None:
    seeds = np.array([seed_of(1, 2, 3, index) for index in range(4)], dtype=np.uint64)
    together = np.stack([uniforms(seeds, position) for position in range(50)])
    alone = np.stack([uniforms(seeds[[2]], position) for position in range(50)])
    assert (together[:, [2]] == alone).all()
    assert len(np.unique(together)) == together.size
    others = [seed_of(0, 2, 3, 0), seed_of(1, 1, 3, 0), seed_of(1, 2, 4, 0), *seeds.tolist()]
    assert len(set(others)) == len(others)


def test_the_numbers_of_samples_are_uniform_and_independent() -> None:
    seeds = np.array([seed_of(0, 0, prompt, 0) for prompt in range(400)], dtype=np.uint64)
    found = np.stack([uniforms(seeds, position) for position in range(50)])
    assert found.min() >= 0 and found.max() < 1
    shares, _ = np.histogram(found, bins=20, range=(0, 1))
    assert ((shares - 1000) ** 2 / 1000).sum() < 43.8  # chi-square with 19 degrees of freedom: 1 in 1000
    assert abs(np.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]) < 0.03


def test_steps_go_through_all_prompts_and_a_prompt_taken_twice_gets_other_samples() -> None:
    steps = [requests(7, step, prompts=4, samples=2, size=6) for step in range(3)]
    prompts = [request.prompt for step in steps for request in step]
    assert sorted(prompts) == sorted([*range(6), *range(6)])
    assert steps == [requests(7, step, prompts=4, samples=2, size=6) for step in range(3)]
    assert requests(8, 0, prompts=4, samples=2, size=6) != steps[0]
    crowded = requests(7, 0, prompts=4, samples=2, size=1)
    assert [request.indices for request in crowded] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert len({seed for request in crowded for seed in request.seeds(7).tolist()}) == 8


def test_the_updates_of_an_epoch_share_out_all_rows_in_an_order_of_their_own() -> None:
    first, second = (minibatches(0, 3, epoch, rows=11, num=4) for epoch in range(2))
    for parts in (first, second):
        assert sorted(np.concatenate(parts).tolist()) == list(range(11))
        assert [len(part) for part in parts] == [2, 3, 3, 3]
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()


def group(step: int, at: int, version: int, **changes: Any) -> Group:
    return Group(step, at, (sample(at=at, step=step, version=version), sample(at=at, step=step, version=version + 1)))


def test_a_step_takes_its_groups_in_the_order_of_their_prompts_whenever_they_came() -> None:
    buffer = Buffer(prompts=3)
    for at in (2, 0):
        assert buffer.add(group(0, at, 0))
    assert buffer.missing() == [1]
    with pytest.raises(UnitrainError, match="step 0 lacks the samples of 1 prompts, the first 1"):
        buffer.take()
    buffer.drop(0, 1, "the reward failed")
    taken = buffer.take()
    assert [each.place for each in taken.groups] == [0, 2]
    assert taken.dropped == {1: "the reward failed"}
    assert (buffer.step, len(buffer), buffer.missing()) == (1, 0, [0, 1, 2])


def test_what_comes_twice_or_too_late_is_not_kept() -> None:
    buffer = Buffer(prompts=1)
    assert buffer.add(group(0, 0, 0))
    assert not buffer.add(group(0, 0, 0))
    buffer.take()
    assert not buffer.add(group(0, 0, 0))
    buffer.drop(1, 0, "")
    assert not buffer.add(group(1, 0, 1))


def test_what_should_not_have_been_generated_is_an_error() -> None:
    buffer = Buffer(prompts=2, max_staleness=1, step=5)
    assert buffer.add(group(5, 0, 4))
    with pytest.raises(UnitrainError, match="version 3, 2 steps older; at most 1 are allowed"):
        buffer.add(group(5, 1, 3))
    with pytest.raises(UnitrainError, match="generation may be 1 steps ahead"):
        buffer.add(group(7, 0, 7))
    with pytest.raises(UnitrainError, match="prompt 2 of step 5, which has 2"):
        buffer.add(group(5, 2, 5))
    with pytest.raises(RecipeError, match="max_staleness"):
        Buffer(prompts=1, max_staleness=-1)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_however_slow_generation_is_no_sample_is_older_than_allowed_and_none_is_lost(max_staleness: int) -> None:
    """Generation and training take turns at random; groups arrive in any order, with the version they began with."""
    draw = random.Random(max_staleness)
    buffer, prompts, steps = Buffer(prompts=4, max_staleness=max_staleness), 4, 30
    to_send = [(step, at) for step in range(steps) for at in range(prompts)]
    under_way: list[Group] = []
    ages = []
    while buffer.step < steps:
        if to_send and buffer.may_generate(to_send[0][0], buffer.step) and draw.random() < 0.7:
            step, at = to_send.pop(0)
            under_way.append(group(step, at, buffer.step))
        elif under_way and draw.random() < 0.6:
            assert buffer.add(under_way.pop(draw.randrange(len(under_way))))
        elif not buffer.missing():
            step = buffer.step
            ages += [step - each.version for each in buffer.take().groups]
        assert len(buffer) <= prompts * (1 + max_staleness)
    assert len(ages) == steps * prompts
    assert max(ages) == max_staleness and min(ages) >= 0


def test_a_saved_buffer_goes_on_with_its_samples_or_asks_for_them_again() -> None:
    buffer = Buffer(prompts=3, max_staleness=1)
    buffer.add(group(0, 1, 0))
    buffer.add(group(1, 2, 0))
    buffer.drop(0, 2, "late")
    saved, requeued = (json.loads(json.dumps(buffer.state(keep))) for keep in ("save", "requeue"))
    again = Buffer(prompts=3, max_staleness=1)
    again.load(saved)
    assert (again.missing(0), again.missing(1), len(again)) == ([0], [0, 1], 2)
    again.add(group(0, 0, 0))
    buffer.add(group(0, 0, 0))
    assert [each.samples[0].state() for each in again.take().groups] == [
        each.samples[0].state() for each in buffer.take().groups
    ]
    again.load(requeued)
    assert (again.missing(0), again.missing(1)) == ([0, 1], [0, 1, 2])
    strict = Buffer(prompts=3, max_staleness=0)
    strict.load(saved)
    assert (strict.missing(0), len(strict)) == ([0], 1)
    with pytest.raises(RecipeError, match="save or requeue"):
        buffer.state("keep")
