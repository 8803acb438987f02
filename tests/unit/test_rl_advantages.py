"""Advantage estimators against slow loops, identities and TRL's own numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unitrain.errors import RecipeError, UserError
from unitrain.rl.advantages import Advantages, Episodes, dr_grpo, gae, grpo, reinforce_pp, rloo, whitened
from unitrain.rl.kl import estimate
from unitrain.rl.registry import ADVANTAGES

pytestmark = pytest.mark.fast

FIXTURES = Path(__file__).parents[1] / "fixtures" / "rl"
TRL: dict[str, Any] = json.loads((FIXTURES / "trl.json").read_text(encoding="utf-8"))["advantages"]
PPO: dict[str, Any] = json.loads((FIXTURES / "ppo.json").read_text(encoding="utf-8"))


def slow_gae(
    rewards: NDArray[Any], values: NDArray[Any], mask: NDArray[Any], gamma: float, lam: float
) -> NDArray[np.float64]:
    """The definition: a sum over all later TD errors of the tokens that count."""
    found = np.zeros(mask.shape)
    for row in range(len(mask)):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        following = [*(values[row, t] for t in places[1:]), 0.0][: len(places)]
        errors = [rewards[row, t] + gamma * v - values[row, t] for t, v in zip(places, following, strict=True)]
        for n, t in enumerate(places):
            found[row, t] = sum((gamma * lam) ** k * error for k, error in enumerate(errors[n:]))
    return found


def drawn(seed: int, rows: int, tokens: int, *, holes: bool = True) -> Episodes:
    draw = np.random.default_rng(seed)
    mask = draw.random((rows, tokens)) < 0.7 if holes else np.arange(tokens) < draw.integers(1, tokens + 1, (rows, 1))
    groups = np.arange(rows) // 2
    return Episodes(draw.normal(size=mask.shape), mask, groups, draw.normal(size=mask.shape))


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_gae_is_what_a_slow_loop_over_its_definition_gives(
    seed: int, rows: int, tokens: int, gamma: float, lam: float
) -> None:
    batch = drawn(seed, rows, tokens)
    found = gae(batch, gamma=gamma, lam=lam, whiten=False)
    assert batch.values is not None and found.returns is not None
    slow = slow_gae(batch.rewards, batch.values, batch.mask, gamma, lam)
    np.testing.assert_allclose(found.advantages, slow, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.returns, np.where(batch.mask, slow + batch.values, 0), rtol=0, atol=1e-10)


def test_gae_at_the_ends_of_lambda_is_the_return_less_the_value_and_the_td_error() -> None:
    batch = drawn(1, 5, 8)
    assert batch.values is not None
    rewards, values = (np.where(batch.mask, each, 0) for each in (batch.rewards, batch.values))
    to_come = np.flip(np.cumsum(np.flip(rewards, 1), 1), 1)
    whole = gae(batch, gamma=1, lam=1, whiten=False).advantages
    np.testing.assert_allclose(whole, np.where(batch.mask, to_come - values, 0), atol=1e-10)
    step = gae(batch, gamma=0, lam=0.5, whiten=False).advantages
    np.testing.assert_allclose(step, rewards - values, atol=1e-10)


def test_gae_steps_over_masked_tokens_and_nothing_follows_the_last() -> None:
    dense = Episodes(np.array([[1.0, 2.0, 3.0]]), np.ones((1, 3), bool), None, np.array([[0.1, 0.2, 0.3]]))
    mask = np.array([[True, False, True, True, False]])
    holes = Episodes(np.array([[1.0, 9, 2, 3, 9]]), mask, None, np.array([[0.1, 7, 0.2, 0.3, 7]]))
    for found in zip(gae(dense), gae(holes), strict=True):
        np.testing.assert_array_equal(found[0], found[1][mask][None])


ESTIMATORS = {
    "gae": lambda batch: gae(batch),
    "grpo": lambda batch: grpo(batch),
    "grpo by batch": lambda batch: grpo(batch, scale="batch"),
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": lambda batch: reinforce_pp(batch, gamma=0.9),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -1e300])
def test_what_stands_in_masked_places_changes_nothing(name: str, rubbish: float) -> None:
    batch = drawn(2, 6, 7)
    batch.mask[4] = False  # a sample that could not be scored
    assert batch.values is not None
    clean = ESTIMATORS[name](batch)
    dirty = ESTIMATORS[name](
        Episodes(
            np.where(batch.mask, batch.rewards, rubbish),
            batch.mask,
            batch.groups,
            np.where(batch.mask, batch.values, rubbish),
        )
    )
    for before, after in zip(clean, dirty, strict=True):
        if before is not None:
            np.testing.assert_array_equal(before, after)
    assert np.all(clean.advantages[~batch.mask] == 0)
    assert np.any(clean.advantages != 0)


def of_rewards(rewards: NDArray[Any], *, without: list[list[int]] = ()) -> Episodes:  # type: ignore[assignment]
    """One row of rewards a prompt, on the last of three tokens."""
    rows = rewards.size
    spread = np.zeros((rows, 3))
    spread[:, 2] = rewards.flatten()
    mask = np.ones((rows, 3), dtype=bool)
    for prompt, sample in without:
        mask[prompt * rewards.shape[1] + sample] = False
    return Episodes(spread, mask, np.repeat(np.arange(len(rewards)), rewards.shape[1]))


@pytest.mark.parametrize("name", ["grpo group", "grpo batch", "dr_grpo", "rloo"])
def test_group_advantages_are_those_that_trl_computes(name: str) -> None:
    batch = of_rewards(np.array(TRL["rewards"]), without=TRL["unscored"])
    method, _, scale = name.partition(" ")
    found: Advantages = ADVANTAGES.bind(method, {"scale": scale} if scale else {})(batch)
    expected = np.array(TRL["found"][name])
    np.testing.assert_allclose(found.advantages[:, 0].reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def test_a_group_of_equal_rewards_teaches_nothing() -> None:
    batch = of_rewards(np.array([[0.1, 0.1, 0.1], [0, 1, 2]]))
    for method in (grpo, dr_grpo, rloo):
        found = method(batch).advantages
        assert np.all(found[:3] == 0) and np.any(found[3:] != 0)


def test_grpo_knows_neither_shift_nor_scale_of_rewards() -> None:
    rewards = np.random.default_rng(3).normal(size=(4, 5))
    one, other = (grpo(of_rewards(each), eps=0).advantages for each in (rewards, 100 * rewards - 7))
    np.testing.assert_allclose(one, other, atol=1e-9)


def test_rloo_is_the_centred_reward_times_n_over_n_minus_1_and_sums_to_zero() -> None:
    rewards = np.random.default_rng(4).normal(size=(4, 5))
    found = rloo(of_rewards(rewards)).advantages[:, 0].reshape(4, 5)
    np.testing.assert_allclose(found, 5 / 4 * (rewards - rewards.mean(1, keepdims=True)), atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-12)
    np.testing.assert_allclose(found[1, 2], rewards[1, 2] - np.delete(rewards[1], 2).mean(), atol=1e-12)


def test_a_prompt_with_one_sample_left_teaches_nothing_and_a_run_of_such_prompts_is_refused() -> None:
    left = of_rewards(np.array([[1.0, 5.0], [0.0, 1.0]]), without=[[0, 1]])
    for method in (grpo, dr_grpo, rloo):
        assert np.all(method(left).advantages[:2] == 0)
        with pytest.raises(UserError, match="at least 2 samples per prompt"):
            method(of_rewards(np.array([[1.0], [2.0]])))


def test_reinforce_pp_is_the_whitened_discounted_reward_to_come() -> None:
    batch = drawn(5, 4, 6)
    rewards, mask = batch.rewards, batch.mask
    to_come = np.zeros(mask.shape)
    for row in range(4):
        places = np.flatnonzero(mask[row])
        for n, t in enumerate(places):
            to_come[row, t] = sum(0.9**k * rewards[row, later] for k, later in enumerate(places[n:]))
    chosen = to_come[mask]
    expected = (chosen - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(reinforce_pp(batch, gamma=0.9).advantages[mask], expected, atol=1e-10)


def test_ppo_advantages_are_those_that_trl_computes() -> None:
    """From log-probabilities, reference, values and scores: KL in the reward, GAE, whitening."""
    options = PPO["options"]
    logprobs, ref, values, mask = (np.array(PPO[name]) for name in ("logprobs", "ref", "values", "mask"))
    rewards = -options["kl_coef"] * estimate("k1", logprobs, ref, mask)
    lengths = mask.sum(axis=1)
    with_end = np.arange(mask.shape[1]) <= lengths[:, None]  # TRL's critic also values the state after the end,
    last = np.minimum(lengths, mask.shape[1] - 1)  # and its reward stands there
    rewards[np.arange(len(rewards)), last] += PPO["scores"]
    batch = Episodes(rewards, with_end, None, values)
    found = gae(batch, gamma=options["gamma"], lam=options["lam"], whiten=False).advantages
    expected = np.array(PPO["raw_advantages"])
    np.testing.assert_allclose(found[with_end], expected[with_end], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whitened(found, mask)[mask], np.array(PPO["advantages"])[mask], rtol=1e-5, atol=1e-6)


def test_refusals_say_what_to_do() -> None:
    batch = of_rewards(np.ones((2, 2)))
    with pytest.raises(UserError, match="needs a critic"):
        gae(batch)
    with pytest.raises(RecipeError, match="scale of grpo is 'sample'"):
        grpo(batch, scale="sample")
    with pytest.raises(RecipeError, match="no option 'lamda', did you mean 'lam'"):
        ADVANTAGES.bind("gae", {"lamda": 1})
