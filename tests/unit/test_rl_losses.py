"""Policy, value and preference losses: against TRL's own numbers, hand-made tables, and any way to split a batch."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unitrain.errors import RecipeError, UnknownName, UserError
from unitrain.rl.aggregate_torch import AGGREGATES, aggregated, plus
from unitrain.rl.kl_torch import kl_loss
from unitrain.rl.policy_losses_torch import PerToken, Tokens, policy_loss, value_loss
from unitrain.rl.preferences_torch import Pairs, kto, kto_reference, reward_model_loss
from unitrain.rl.registry import POLICY_LOSSES, PREFERENCE_LOSSES, Registry
from unitrain.strategy import Loss

pytestmark = pytest.mark.fast

FIXTURES = Path(__file__).parents[1] / "fixtures" / "rl"
TRL: dict[str, Any] = json.loads((FIXTURES / "trl.json").read_text(encoding="utf-8"))
PPO: dict[str, Any] = json.loads((FIXTURES / "ppo.json").read_text(encoding="utf-8"))

# TRL's options -> our policy loss, its options and the aggregate
OURS = {
    "ppo, mean over samples": ("ppo", {}, "sequence"),
    "ppo, mean over tokens": ("ppo", {}, "token"),
    "ppo, mean over a constant": ("ppo", {}, "constant"),
    "ppo, asymmetric": ("ppo", {"clip_low": 0.1, "clip_high": 0.4}, "token"),
    "ppo, with k3": ("ppo", {}, "token"),
    "ppo, with corrected k3": ("ppo", {}, "token"),
    "gspo": ("gspo", {"clip_low": 0.1, "clip_high": 0.2}, "sequence"),
    "cispo": ("cispo", {"clip_high": 0.5}, "token"),
}


def mean(loss: Loss) -> float:
    return float(loss.sum.detach()) / float(loss.weight)


def close(found: Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("name", TRL["policy"]["found"])
def test_a_policy_loss_and_its_gradient_are_those_that_trl_computes(name: str) -> None:
    given, theirs = TRL["policy"], TRL["policy"]["found"][name]
    function, options, aggregate = OURS[name]
    mask = torch.tensor(given["mask"]).bool()
    logprobs = torch.tensor(given["logprobs"], requires_grad=True)
    advantages = torch.tensor(given["advantages"])[:, None].expand_as(logprobs)
    tokens = Tokens(logprobs, torch.tensor(given["old"]), advantages, mask)
    how: dict[str, Any] = {"aggregate": aggregate, "max_tokens": mask.shape[1]}
    loss = policy_loss(POLICY_LOSSES.bind(function, options), tokens, **how)
    if beta := theirs["options"].get("beta"):
        old = tokens.old if theirs["options"]["use_bias_correction_kl"] else None
        loss = plus(loss, beta, kl_loss("k3", logprobs, torch.tensor(given["ref"]), mask, old=old, **how), "kl")
    assert mean(loss) == pytest.approx(theirs["loss"], abs=1e-6, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum / loss.weight, logprobs)
    close(gradient, theirs["gradient"])


@pytest.mark.parametrize("number", range(len(PPO["updates"])))
def test_ppo_policy_and_value_losses_are_those_of_trl_s_last_ppo_trainer(number: int) -> None:
    update, options = PPO["updates"][number], PPO["options"]

    def of_batch(name: str) -> Tensor:
        return torch.tensor(PPO[name])[update["rows"]]

    mask, with_end = torch.tensor(update["policy_mask"]), torch.tensor(update["value_mask"])
    returns = of_batch("raw_advantages") + of_batch("values") * with_end
    tokens = Tokens(torch.tensor(update["logprobs"]), of_batch("logprobs"), of_batch("advantages"), mask)
    clip = {"clip_low": options["cliprange"], "clip_high": options["cliprange"]}
    loss = policy_loss(POLICY_LOSSES.bind("ppo", clip), tokens)
    assert mean(loss) == pytest.approx(update["policy_loss"], rel=1e-5, abs=1e-6)
    clipped = loss.metrics["clip_fraction"]
    assert float(clipped[0] / clipped[1]) == pytest.approx(update["policy_clipped"], abs=1e-6)
    critic = value_loss(
        torch.tensor(update["values"]), of_batch("values"), returns, with_end, clip=options["cliprange_value"]
    )
    assert mean(critic) == pytest.approx(update["value_loss"], rel=1e-5, abs=1e-6)
    clipped = critic.metrics["value_clip_fraction"]
    assert float(clipped[0] / clipped[1]) == pytest.approx(update["value_clipped"], abs=1e-6)


# advantage, ratio, options -> loss, derivative with respect to log pi (-A ratio where it counts, 0 where clipped)
TABLE = [
    (1.0, 1.0, {}, -1.0, -1.0),
    (1.0, 1.5, {}, -1.2, 0.0),  # far enough already
    (1.0, 0.5, {}, -0.5, -0.5),  # moved the wrong way: pulled back
    (-1.0, 0.5, {}, 0.8, 0.0),
    (-1.0, 1.5, {}, 1.5, 1.5),
    (1.0, 1.25, {"clip_high": 0.3}, -1.25, -1.25),  # asymmetric: still inside
    (-1.0, 0.75, {"clip_low": 0.3}, 0.75, 0.75),
    (-1.0, 4.0, {"dual_clip": 3.0}, 3.0, 0.0),
    (-1.0, 2.0, {"dual_clip": 3.0}, 2.0, 2.0),
    (1.0, 0.1, {"dual_clip": 3.0}, -0.1, -0.1),
]


@pytest.mark.parametrize(("advantage", "ratio", "options", "value", "slope"), TABLE)
def test_ppo_clips_as_the_table_says(
    advantage: float, ratio: float, options: dict[str, float], value: float, slope: float
) -> None:
    logprobs = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    tokens = Tokens(logprobs, torch.zeros(1, 1).double(), torch.tensor([[advantage]]).double(), torch.ones(1, 1).bool())
    loss = policy_loss(POLICY_LOSSES.bind("ppo", options), tokens)
    assert mean(loss) == pytest.approx(value, abs=1e-7)
    (gradient,) = torch.autograd.grad(loss.sum, logprobs)
    assert float(gradient) == pytest.approx(slope, abs=1e-7)


# value, old, return, clip -> loss, derivative
VALUES = [
    (1.0, 1.0, 2.0, 0.2, 0.5, -1.0),
    (1.5, 1.0, 2.0, 0.2, 0.32, 0.0),  # clipped to 1.2, which is the worse one: no gradient
    (1.5, 1.0, 1.0, 0.2, 0.125, 0.5),  # moved away from the return: the plain error is the worse one
    (1.5, 1.0, 2.0, None, 0.125, -0.5),
]


@pytest.mark.parametrize(("value", "old", "goal", "clip", "expected", "slope"), VALUES)
def test_the_value_loss_clips_as_the_table_says(
    value: float, old: float, goal: float, clip: float | None, expected: float, slope: float
) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1)
    loss = value_loss(values, old * one, goal * one, one.bool(), clip=clip)
    assert mean(loss) == pytest.approx(expected, abs=1e-7)
    (gradient,) = torch.autograd.grad(loss.sum, values)
    assert float(gradient) == pytest.approx(slope, abs=1e-7)


def test_cispo_gives_every_token_a_gradient_however_far_its_ratio() -> None:
    logprobs = torch.tensor([[2.0, -3.0, 0.0]], requires_grad=True)
    tokens = Tokens(logprobs, torch.zeros(1, 3), torch.tensor([[1.0, 1.0, -1.0]]), torch.ones(1, 3).bool())
    loss = policy_loss(POLICY_LOSSES.bind("cispo", {"clip_low": 0.5, "clip_high": 0.5}), tokens)
    (gradient,) = torch.autograd.grad(loss.sum, logprobs)
    close(gradient, [[-1.5, -0.5, 1.0]])


def test_gspo_is_the_gradient_of_the_whole_sample_s_ratio() -> None:
    """Against the definition for whole samples, by autograd."""
    draws = torch.Generator().manual_seed(3)
    logprobs, old = (-torch.rand(2, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    logprobs.requires_grad_()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    advantages = torch.tensor([[0.5], [-2.0]]).double()
    function = POLICY_LOSSES.bind("gspo", {"clip_low": 9.0, "clip_high": 9.0})
    tokens = Tokens(logprobs, old, advantages.expand(2, 4), mask)
    loss = policy_loss(function, tokens, aggregate="sequence")
    ratio = (((logprobs - old) * mask).sum(1) / mask.sum(1)).exp()
    whole = -(ratio * advantages[:, 0]).sum()
    torch.testing.assert_close(loss.sum, whole)
    one, other = (torch.autograd.grad(each, logprobs, retain_graph=True)[0] for each in (loss.sum, whole))
    torch.testing.assert_close(one, other)


def batch(rows: int = 7, columns: int = 5, *, rubbish: float | None = None) -> tuple[Tokens, Tensor, Tensor]:
    """Tokens, and two more arrays of their shape; the third row has none."""
    draws = torch.Generator().manual_seed(1)
    first, old, advantages, ref, weights = (
        torch.randn(rows, columns, generator=draws, dtype=torch.float64) for _ in range(5)
    )
    mask = torch.rand(rows, columns, generator=draws) < 0.7
    mask[2] = False
    if rubbish is not None:
        first, old, advantages, ref, weights = (
            torch.where(mask, each, rubbish) for each in (first, old, advantages, ref, weights)
        )
    return Tokens(first.requires_grad_(), old, advantages, mask), ref, weights


def everything(tokens: Tokens, ref: Tensor, weights: Tensor, name: str, aggregate: str) -> Loss:
    """A policy loss with importance weights and a KL term."""
    how: dict[str, Any] = {"aggregate": aggregate, "max_tokens": 11}
    loss = policy_loss(name, tokens, weights=weights, **how)
    return plus(loss, 0.3, kl_loss("k3", tokens.logprobs, ref, tokens.mask, old=tokens.old, **how), "kl")


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -1e30])
def test_what_stands_in_masked_places_changes_neither_loss_nor_gradient(
    name: str, aggregate: str, rubbish: float
) -> None:
    found = []
    for garbage in (None, rubbish):
        tokens, ref, weights = batch(rubbish=garbage)
        loss = everything(tokens, ref, weights, name, aggregate)
        (gradient,) = torch.autograd.grad(loss.sum / loss.weight, tokens.logprobs)
        metrics = [float(value) for pair in loss.metrics.values() for value in pair]
        found.append((float(loss.sum.detach()), float(loss.weight), metrics, gradient))
    assert found[0][:3] == found[1][:3]
    assert torch.equal(found[0][3], found[1][3])
    assert found[0][3].abs().sum() > 0


def parts_of(rows: int, parts: int) -> list[slice]:
    return [slice(part * rows // parts, (part + 1) * rows // parts) for part in range(parts)]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_any_split_into_micro_batches_and_ranks_gives_the_gradient_of_the_whole(
    name: str, aggregate: str, parts: int
) -> None:
    """Sums and weights add up, empty rows and parts of fully masked rows included, and metrics too."""
    tokens, ref, weights = batch()
    whole = everything(tokens, ref, weights, name, aggregate)
    (expected,) = torch.autograd.grad(whole.sum / whole.weight, tokens.logprobs)
    losses = [
        everything(Tokens(*(each[part] for each in tokens)), ref[part], weights[part], name, aggregate)  # type: ignore[call-arg]
        for part in parts_of(7, parts)
    ]
    weight = sum(float(loss.weight) for loss in losses)
    assert weight == float(whole.weight)
    (gradient,) = torch.autograd.grad(sum(loss.sum for loss in losses) / weight, tokens.logprobs)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    for metric, (amount, share) in whole.metrics.items():
        assert sum(float(loss.metrics[metric][0]) for loss in losses) == pytest.approx(float(amount), rel=1e-9)
        assert sum(float(loss.metrics[metric][1]) for loss in losses) == float(share)


def test_the_mean_is_over_what_the_aggregate_says() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    means = {name: mean(Loss(*aggregated(values, mask, name, max_tokens=4))) for name in AGGREGATES}
    assert means == {"token": 10 / 4, "sequence": (2 + 4) / 2, "sequence_sum": 10 / 2, "constant": 10 / 8}
    with pytest.raises(RecipeError, match="say how many"):
        aggregated(values, mask, "constant")
    with pytest.raises(RecipeError, match="must be one of token, sequence"):
        aggregated(values, mask, "row")


def test_importance_weights_multiply_each_token_s_loss() -> None:
    tokens, _, _ = batch()
    weights = torch.full_like(tokens.old, 0.5)
    assert mean(policy_loss("ppo", tokens, weights=weights)) == pytest.approx(mean(policy_loss("ppo", tokens)) / 2)


def test_a_zero_coefficient_adds_no_term_but_still_its_metric() -> None:
    tokens, ref, _ = batch()
    loss = policy_loss("ppo", tokens)
    term = kl_loss("k3", tokens.logprobs, ref, tokens.mask)
    both = plus(loss, 0.0, term, "kl")
    assert both.sum is loss.sum and float(both.metrics["kl"][0]) == float(term.sum.detach())


def given_pairs(logprobs: Tensor) -> Pairs:
    given = TRL["pairs"]
    ref, tokens = torch.tensor(given["ref"]), torch.tensor(given["tokens"])
    return Pairs(logprobs[0], logprobs[1], ref[0], ref[1], tokens[0], tokens[1])


@pytest.mark.parametrize("name", ["dpo", "ipo", "cdpo"])
def test_a_preference_loss_and_its_gradient_are_those_that_trl_computes(name: str) -> None:
    given, theirs = TRL["pairs"], TRL["pairs"]["found"][name]
    logprobs = torch.tensor(given["logprobs"], requires_grad=True)
    smoothing = {"label_smoothing": given["label_smoothing"]} if name == "cdpo" else {}
    loss = PREFERENCE_LOSSES.bind(name, {"beta": given["beta"], **smoothing})(given_pairs(logprobs))
    (gradient,) = torch.autograd.grad(loss.sum, logprobs)
    if name == "cdpo":  # of each pair alone
        assert float(loss.sum.detach()) == pytest.approx(sum(theirs["loss"]), rel=1e-5)
        close(gradient, theirs["gradient"])
    else:
        assert mean(loss) == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)
        close(gradient / loss.weight, theirs["gradient"])


def test_kto_and_its_gradient_are_those_that_trl_computes() -> None:
    given = TRL["kto"]
    logprobs = torch.tensor(given["logprobs"], requires_grad=True)
    found = kto_reference(torch.tensor(given["mismatched"]), torch.tensor(given["mismatched_ref"]))
    loss = kto(
        logprobs,
        torch.tensor(given["ref"]),
        torch.tensor(given["desirable"]),
        max(0.0, mean(found)),
        beta=given["beta"],
        desirable_weight=given["desirable_weight"],
        undesirable_weight=given["undesirable_weight"],
    )
    assert mean(found) > 0 and mean(loss) == pytest.approx(given["loss"], rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum / loss.weight, logprobs)
    close(gradient, given["gradient"])


def test_the_reward_model_s_loss_and_its_gradient_are_those_that_trl_computes() -> None:
    given = TRL["reward_model"]
    scores = torch.tensor(given["scores"], requires_grad=True)
    loss = reward_model_loss(scores[0], scores[1], margin=torch.tensor(given["margin"]), center=given["center"])
    assert mean(loss) == pytest.approx(given["loss"], rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum / loss.weight, scores)
    close(gradient, given["gradient"])
    accuracy, share = loss.metrics["accuracy"]
    assert (float(accuracy), float(share)) == (sum(a > b for a, b in zip(*given["scores"], strict=True)), 5)


def test_a_filler_pair_counts_for_nothing_even_where_it_is_nan() -> None:
    logprobs = torch.tensor(TRL["pairs"]["logprobs"])
    weight = torch.tensor([1.0, 0, 1, 1, 1])
    for name in PREFERENCE_LOSSES.names:
        function = PREFERENCE_LOSSES.get(name)
        dirty = logprobs.clone()
        dirty[:, 1] = torch.nan
        loss = function(given_pairs(dirty)._replace(weight=weight))
        alone = [function(Pairs(*(each[[row]] for each in given_pairs(logprobs)[:6]))) for row in (0, 2, 3, 4)]  # type: ignore[call-arg]
        assert float(loss.weight) == 4
        assert float(loss.sum) == pytest.approx(sum(float(one.sum) for one in alone), rel=1e-6)
        assert all(torch.isfinite(amount) for amount, _ in loss.metrics.values())


def test_cdpo_without_wrong_labels_is_dpo() -> None:
    pairs = given_pairs(torch.tensor(TRL["pairs"]["logprobs"]))
    one, other = PREFERENCE_LOSSES.get("dpo"), functools.partial(PREFERENCE_LOSSES.get("cdpo"), label_smoothing=0.0)
    assert torch.equal(one(pairs).sum, other(pairs).sum)
    with pytest.raises(RecipeError, match=r"below 0.5"):
        PREFERENCE_LOSSES.get("cdpo")(pairs, label_smoothing=0.5)


def test_research_code_adds_a_policy_loss_by_one_formula() -> None:
    losses = Registry("policy loss", {"ppo": "unitrain.rl.policy_losses_torch:ppo"})

    @losses.register("plain")
    def plain(tokens: Tokens, *, scale: float = 1.0) -> PerToken:
        return PerToken(-scale * tokens.advantages * tokens.ratio())

    tokens, _, _ = batch(rubbish=float("nan"))
    loss = policy_loss(losses.bind("plain", {"scale": 2.0}), tokens)
    assert torch.isfinite(loss.sum)
    assert losses.names == ["plain", "ppo"]
    with pytest.raises(RecipeError, match="no option 'scal', did you mean 'scale'"):
        losses.bind("plain", {"scal": 1})
    with pytest.raises(UnknownName, match=r"no policy loss named 'pp0', did you mean 'ppo'"):
        losses.get("pp0")
    with pytest.raises(UserError, match=r"'ppo' is unitrain.rl.policy_losses_torch:ppo already"):
        losses.register("ppo")(plain)
    assert losses.get("unitrain.rl.policy_losses_torch:gspo") is POLICY_LOSSES.get("gspo")
