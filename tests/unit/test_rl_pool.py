"""Who answers which prompts, what becomes of calls that fail, and how old samples may be: decisions, without actors."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unitrain.errors import RecipeError, UserError
from unitrain.recipe_file import check, recipe_from_text
from unitrain.rl.dispatch import Call, Dispatch, GivenUp, backoff_seconds, calls
from unitrain.rl.prompts import requests
from unitrain.rl.recipe import DEFAULTS, rl_recipe
from unitrain.rl.sampler import content_hash

pytestmark = pytest.mark.fast


def step_of(step: int, *, prompts: int = 7, at_once: int = 3) -> list[Call]:
    asked = requests(1, step, prompts=prompts, samples=2, size=100)
    return calls(asked, step, at_once, range(prompts))


def test_a_step_is_cut_alike_whatever_is_still_wanted_of_it():
    asked = requests(1, 4, prompts=7, samples=2, size=100)
    whole = calls(asked, 3, 3, range(7))
    assert [len(call.requests) for call in whole] == [3, 3, 1]
    assert [request for call in whole for request in call.requests] == asked
    part = calls(asked, 3, 3, [0, 2, 6])
    assert [[request.place for request in call.requests] for call in part] == [[0, 2], [6]]
    assert calls(asked, 3, 3, []) == []


def test_calls_go_to_who_has_least_to_do_and_earlier_steps_come_first():
    dispatch = Dispatch(depth=None, retries=1)
    dispatch.add(step_of(5))
    dispatch.add(step_of(4))
    given = dispatch.assign(["a", "b"])
    assert [call.step for _, call in given] == [4, 4, 4, 5, 5, 5]
    assert Counter(actor for actor, _ in given) == {"a": 3, "b": 3}


def test_an_actor_holds_no_more_calls_than_its_depth():
    dispatch = Dispatch(depth=2, retries=1)
    dispatch.add(step_of(0, at_once=1))
    first = dispatch.assign(["a"])
    assert len(first) == 2 and dispatch.assign(["a"]) == []
    dispatch.answered("a", first[0][1])
    assert len(dispatch.assign(["a"])) == 1


def test_only_the_first_call_of_a_lost_actor_is_under_suspicion():
    dispatch = Dispatch(depth=None, retries=0)
    dispatch.add(step_of(0))
    dispatch.assign(["a"])
    assert dispatch.lost("a", "died") == []  # of three prompts: they are tried one by one
    assert [len(call.requests) for call in dispatch.waiting] == [1, 1, 1, 3, 1]
    assert dispatch.lost("nobody", "died") == []


def test_a_call_that_fails_is_made_again_then_cut_then_given_up():
    dispatch = Dispatch(depth=None, retries=2)
    call = step_of(0)[0]
    dispatch.add([call])
    given_up: list[GivenUp] = []
    tried = Counter()
    while dispatch.open:
        for actor, chosen in dispatch.assign(["a", "b"]):
            tried[len(chosen.requests)] += 1
            if any(request.place == 1 for request in chosen.requests):
                given_up += dispatch.failed(actor, chosen, "raised")
            else:
                dispatch.answered(actor, chosen)
    assert [(each.request.place, each.why) for each in given_up] == [(1, "raised (3 times)")]
    assert tried == {3: 3, 1: 5}  # three times whole, the bad prompt three times alone, the two others once


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["answer", "fail", "lose"])), max_size=60))
def test_whatever_happens_every_prompt_is_answered_or_given_up_once(events):
    dispatch = Dispatch(depth=2, retries=1)
    asked = [request for step in (0, 1) for call in step_of(step) for request in call.requests]
    for step in (1, 0):
        dispatch.add(step_of(step))
    done: list[tuple[int, int]] = []

    def answer(actor: str) -> None:
        call = dispatch.running[actor][0]
        dispatch.answered(actor, call)
        done.extend((request.step, request.place) for request in call.requests)

    for actor, event in events:
        dispatch.assign(list("abc"))
        if not dispatch.running.get(actor):
            continue
        call, found = dispatch.running[actor][0], []
        if event == "answer":
            answer(actor)
        else:
            found = dispatch.failed(actor, call, "no") if event == "fail" else dispatch.lost(actor, "gone")
        done.extend((each.request.step, each.request.place) for each in found)
    while dispatch.open:
        dispatch.assign(list("abc"))
        answer(next(actor for actor, own in dispatch.running.items() if own))
    assert sorted(done) == sorted((request.step, request.place) for request in asked)


def test_actors_are_started_again_at_once_then_later_and_later():
    assert [backoff_seconds(losses) for losses in (1, 2, 3, 4)] == [0.0, 0.5, 1.0, 2.0]
    assert backoff_seconds(50) == 30.0


def test_the_hash_of_all_tensors_tells_names_and_values_apart():
    digests = {"a": 1, "b": 2}
    assert content_hash(digests) == content_hash({"b": 2, "a": 1})
    others = [{"a": 2, "b": 1}, {"a": 1}, {"a": 1, "c": 2}, {"ab": 1, "b": 2}]
    assert len({content_hash(each) for each in [digests, *others]}) == 5


def test_seeds_of_a_request_do_not_depend_on_the_call_it_is_in():
    alone, together = step_of(2, at_once=1), step_of(2, at_once=7)
    seeds = [call.requests[0].seeds(9) for call in alone]
    assert np.array_equal(np.concatenate(seeds), np.concatenate([r.seeds(9) for r in together[0].requests]))


# --- the recipe

RECIPE = """\
trainer: unitrain.rl:GRPO
model: {name: gpt}
data: {name: records, path: "unitrain.rl.examples:letters", seq_len: 10}
rl: {reward: {function: "unitrain.rl.examples:vowels"}}
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.rolout={actors: 1}", "did you mean 'rl.rollout"),
        ("rl.rollout={actors: -1}", "rl.rollout.actors is -1"),
        ("rl.rollout={actors: 1, placement: NEAR}", "rl.rollout.placement"),
        ("rl.rollout={actors: 1, retries: often}", "whole number"),
        ("rl.max_staleness=1", "ranks that train also generate"),
        ("rl.buffer=keep", "rl.buffer is 'keep'"),
        ("rl.reward={}", "names no function and no model"),
        ("rl.sampling={temperature: 0}", "explores nothing"),
        ("rl.kl={estimator: k1, corrected: false}", "no gradient"),
        ("rl.rollout={actors: 1, engine: vlm}", "did you mean 'vllm'"),
        ("strategy={name: jax}", "written for torch alone"),
        ("strategy={name: ray}", "in actors; use --strategy ddp or fsdp2"),
        ("rl.strategies={model: ddp}", "one of reference, critic, reward"),
        ("rl.strategies={reference: jax}", "not those of the policy"),
        ("rl.strategies={reference: nope}", "no strategy named 'nope'"),
        ("rl.strategies={reference: 3}", "the name of a strategy"),
    ],
)
def test_mistakes_are_told_before_anything_starts_and_without_a_framework(override, message):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=message):
        check(recipe_from_text(RECIPE, overrides=[override]))


def test_the_check_before_the_start_knows_each_algorithms_defaults():
    # k1 in the reward is what PPO has; in the loss, GRPO's place for it, it would be refused.
    check(recipe_from_text(RECIPE, overrides=["trainer=unitrain.rl:PPO", "rl.kl={corrected: false}"]))
    check(recipe_from_text(RECIPE, overrides=["trainer=unitrain.rl:DPO", "rl={}"]))
    with pytest.raises(RecipeError, match="generates nothing"):
        check(recipe_from_text(RECIPE, overrides=["trainer=unitrain.rl:DPO", "rl={rollout: {actors: 1}}"]))
    for name, defaults in DEFAULTS.items():
        assert rl_recipe({}, defaults).advantage.name, name
