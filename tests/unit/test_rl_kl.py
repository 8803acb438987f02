"""KL estimators by enumeration over a small vocabulary, the coefficient's control, and importance weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from unitrain.errors import RecipeError
from unitrain.rl.importance import correction, gap
from unitrain.rl.kl import KL, KLControl, estimate
from unitrain.rl.kl_torch import kl_loss
from unitrain.schema import build

pytestmark = pytest.mark.fast

SYMBOLS = 10


def two_policies(step: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits of a policy, with gradient, and log-probabilities of its reference."""
    draws = torch.Generator().manual_seed(0)
    base = torch.randn(SYMBOLS, generator=draws, dtype=torch.float64)
    move = torch.randn(SYMBOLS, generator=draws, dtype=torch.float64)
    return (base + step * move).requires_grad_(), base.log_softmax(0)


def closed_form(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities."""
    return (p.exp() * (p - q)).sum()


def expected(name: str, policy: Tensor, ref: Tensor) -> float:
    """The estimator's expectation: each symbol once, weighted by its probability."""
    logprobs, everywhere = policy.log_softmax(0).detach(), np.ones((1, SYMBOLS), dtype=bool)
    each = estimate(name, logprobs.numpy()[None], ref.numpy()[None], everywhere)
    return float((logprobs.exp().numpy() * each[0]).sum())


def test_the_expectations_of_k1_and_k3_are_the_kl() -> None:
    policy, ref = two_policies()
    truth = float(closed_form(policy.detach().log_softmax(0), ref))
    assert expected("k1", policy, ref) == pytest.approx(truth, abs=1e-9)
    assert expected("k3", policy, ref) == pytest.approx(truth, abs=1e-9)


def test_k2_comes_close_to_the_kl_as_the_policies_do() -> None:
    errors = []
    for step in (0.1, 0.01):
        policy, ref = two_policies(step)
        truth = float(closed_form(policy.detach().log_softmax(0), ref))
        errors.append(abs(expected("k2", policy, ref) / truth - 1))
    assert errors[1] < 0.2 * errors[0] < 0.05


def gradient_of(name: str, drawn_from: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The expected gradient of the loss term, and those of both KLs, with respect to the logits.

    Tokens are drawn from the policy itself, or from log-probabilities by which the term is then corrected.
    """
    policy, ref = two_policies()
    logprobs = policy.log_softmax(0)
    # Nothing flows through how often a token is drawn.
    weights = (logprobs.detach() if drawn_from is None else drawn_from).exp()
    one = torch.ones(1, 1).bool()
    terms = []
    for symbol in range(SYMBOLS):
        mine, theirs = logprobs[symbol].view(1, 1), ref[symbol].view(1, 1)
        old = None if drawn_from is None else drawn_from[symbol].view(1, 1)
        terms.append(weights[symbol] * kl_loss(name, mine, theirs, one, old=old).sum)
    (found,) = torch.autograd.grad(torch.stack(terms).sum(), policy, retain_graph=True)
    (forward,) = torch.autograd.grad(closed_form(logprobs, ref), policy, retain_graph=True)
    (reverse,) = torch.autograd.grad(closed_form(ref, logprobs), policy)
    return found, forward, reverse


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_corrected_every_estimator_has_the_gradient_of_the_kl_whoever_drew_the_tokens(name: str) -> None:
    policy, _ = two_policies()
    itself = policy.detach().log_softmax(0)
    other = torch.randn(SYMBOLS, generator=torch.Generator().manual_seed(9), dtype=torch.float64).log_softmax(0)
    for drawn_from in (itself, other):
        found, forward, _ = gradient_of(name, drawn_from)
        torch.testing.assert_close(found, forward, rtol=0, atol=1e-8)


def test_as_a_loss_k2_has_the_gradient_of_the_kl_k3_of_the_opposite_one_and_k1_none() -> None:
    found, forward, _ = gradient_of("k2")
    torch.testing.assert_close(found, forward, rtol=0, atol=1e-8)
    found, forward, opposite = gradient_of("k3")
    torch.testing.assert_close(found, opposite, rtol=0, atol=1e-8)
    assert (found - forward).abs().max() > 1e-2
    found, _, _ = gradient_of("k1")
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-8)


def test_k1_in_the_loss_is_refused_where_it_would_do_nothing() -> None:
    with pytest.raises(RecipeError, match="no gradient in expectation; use k2 or k3"):
        KL(where="loss", estimator="k1", corrected=False)
    assert KL(where="loss", estimator="k1").corrected
    assert build(KL, {"where": "reward", "estimator": "k1", "coef": 0.1}, "kl").coef == 0.1


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_numpy_and_torch_estimate_alike_and_far_policies_overflow_in_neither(name: str) -> None:
    draw = np.random.default_rng(1)
    logprobs, ref = -draw.random((3, 4)) * 5, -draw.random((3, 4)) * 5
    logprobs[0, 0], ref[0, 1] = -500, -500
    mask = draw.random((3, 4)) < 0.8
    mask[0, :2] = True
    values = estimate(name, logprobs, ref, mask)
    loss = kl_loss(name, torch.tensor(logprobs), torch.tensor(ref), torch.tensor(mask))
    assert np.isfinite(values).all()
    assert float(loss.sum) == pytest.approx(values.sum(), rel=1e-12)
    assert float(loss.weight) == mask.sum()


def test_an_adaptive_coefficient_follows_a_known_sequence() -> None:
    """Ziegler et al.: the error is clipped to 0.2, and a step counts as the share of the horizon it has."""
    control = KLControl(KL(coef=0.2, target=6.0, horizon=1000))
    seen = []
    for kl in (6.0, 60.0, 0.0, 6.6, float("nan")):
        control.update(kl, 100)
        seen.append(control.coef)
    assert seen == pytest.approx([0.2, 0.2 * 1.02, 0.2 * 1.02 * 0.98, 0.2 * 1.02 * 0.98 * 1.01, seen[3]], rel=1e-12)
    control.update(0.0, 10**6)
    assert control.coef == pytest.approx(seen[3] * 0.8)
    resumed = KLControl(control.options)
    resumed.load(json.loads(json.dumps(control.state())))
    assert resumed.coef == control.coef


def test_a_fixed_coefficient_stays() -> None:
    control = KLControl(KL(coef=0.05))
    control.update(1000.0, 100)
    assert control.coef == 0.05


def test_importance_weights_are_capped_and_masked() -> None:
    trainer = np.log(np.array([[0.5, 0.5, 0.1, 0.5]]))
    rollout = np.log(np.array([[0.5, 0.1, 0.5, np.nan]]))
    mask = np.array([[True, True, True, False]])
    np.testing.assert_allclose(correction(trainer, rollout, mask, cap=2), [[1, 2, 0.2, 0]])
    np.testing.assert_allclose(correction(trainer, rollout, mask, cap=2, beyond="drop"), [[1, 0, 0.2, 0]])
    np.testing.assert_allclose(correction(trainer, rollout, mask, cap=2, level="sequence"), [[1, 1, 1, 0]])
    with pytest.raises(RecipeError, match="one of token, sequence"):
        correction(trainer, rollout, mask, level="word")


def test_importance_weights_correct_a_mean_over_another_policy() -> None:
    """Over a whole vocabulary, without a cap: the mean under the rollout becomes that under the trainer."""
    policy, rollout = (each.detach().log_softmax(0).numpy() for each in two_policies())
    weights = correction(policy[None], rollout[None], np.ones((1, SYMBOLS), dtype=bool), cap=1e9)[0]
    worth = np.arange(SYMBOLS) ** 1.5
    assert (np.exp(rollout) * weights * worth).sum() == pytest.approx((np.exp(policy) * worth).sum(), rel=1e-12)


def test_a_gap_between_rollout_and_trainer_is_measured_and_complained_about() -> None:
    trainer, mask = np.full((2, 3), -1.0), np.array([[True, True, False], [True, False, False]])
    near, far = trainer + 5e-5, trainer.copy()
    far[0, 0], far[0, 2] = -1.3, np.nan
    found = gap(trainer, near, mask)
    assert found.tokens == 3 and found.mean == pytest.approx(5e-5) and found.problem("fp32") == ""
    found = gap(trainer, far, mask)
    assert found.mean == pytest.approx(0.1) and found.most == pytest.approx(0.3)
    assert found.kl == pytest.approx((np.exp(0.3) - 1 - 0.3) / 3)
    assert "same weights and temperature" in found.problem("bf16")
    assert gap(trainer, far, np.zeros_like(mask)).problem("fp32") == ""
