"""Log-probabilities and entropies of tokens, against torch's own softmax, in parts and behind masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unitrain.rl.logprobs_torch import response_logprobs, token_logprobs

pytestmark = pytest.mark.fast


def drawn(rows: int = 6, vocab: int = 700, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, rows // 2, vocab, generator=draws, dtype=torch.float64)).to(dtype)
    return logits.requires_grad_(), torch.randint(vocab, (2, rows // 2), generator=draws)


def plainly(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    every = (logits / temperature).log_softmax(-1)
    return every.gather(-1, targets[..., None])[..., 0], -(every.exp() * every).sum(-1)


@pytest.mark.parametrize("most", [1 << 24, 2000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_a_whole_softmax(most: int, temperature: float) -> None:
    """`most` 2000: the vocabulary in parts of 333, the last of 34."""
    logits, targets = drawn()
    found = token_logprobs(logits, targets, temperature=temperature, most=most)
    expected = plainly(logits, targets, temperature)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        upstream = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=mine.dtype)
        (one,) = torch.autograd.grad(mine, logits, upstream, retain_graph=True)
        (other,) = torch.autograd.grad(theirs, logits, upstream, retain_graph=True)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_low_precision_logits_give_fp32_results_and_low_precision_gradients() -> None:
    logits, targets = drawn(dtype=torch.bfloat16)
    logprobs, entropy = token_logprobs(logits, targets)
    expected = plainly(logits.detach().float(), targets, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close((logprobs, entropy), expected, rtol=1e-5, atol=1e-5)
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_a_masked_token_gives_nothing_and_takes_nothing_whatever_its_logits_are() -> None:
    logits, targets = drawn()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    dirty = logits.detach().clone()
    dirty[~mask] = torch.nan
    dirty.requires_grad_()
    found = []
    for given in (logits, dirty):
        logprobs, entropy = token_logprobs(given, targets, mask=mask, most=2000)
        assert (logprobs[~mask] == 0).all() and (entropy[~mask] == 0).all()
        (gradient,) = torch.autograd.grad((logprobs * 2 + entropy).sum(), given)
        assert (gradient[~mask] == 0).all()
        found.append((logprobs, entropy, gradient))
    for clean, other in zip(*found, strict=True):
        assert torch.equal(clean, other)


def test_tokens_that_a_logit_of_minus_infinity_rules_out_spoil_neither_value_nor_gradient() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([1]))
    allowed = plainly(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), 1.0)
    torch.testing.assert_close((logprobs, entropy), allowed)
    (logprobs + entropy).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad[0, 2] == 0


def test_no_second_copy_of_the_logits_in_fp32_is_ever_made() -> None:
    """The largest tensor that is made, apart from the gradient, has as many numbers as were allowed."""
    seen: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), options=None):  # type: ignore[no-untyped-def]
            found = function(*args, **(options or {}))
            if isinstance(found, Tensor) and found.untyped_storage().data_ptr() != home:
                seen.append(found.numel())
            return found

    logits = torch.randn(8, 4096, requires_grad=True)
    home = logits.untyped_storage().data_ptr()
    targets = torch.zeros(8, dtype=torch.long)
    with Sizes():
        logprobs, _ = token_logprobs(logits, targets, most=8 * 256)
        assert max(seen) <= 8 * 256
        seen.clear()
        logprobs.sum().backward()
    assert {size for size in seen if size > 8 * 256} == {8 * 4096}  # the gradient, and views of it


def test_a_response_s_log_probability_is_the_sum_over_its_own_tokens() -> None:
    values = torch.tensor([[1.0, 2.0, torch.nan], [4.0, 5.0, 6.0]])
    total, count = response_logprobs(values, torch.tensor([[True, True, False], [False, False, True]]))
    assert total.tolist() == [3.0, 6.0] and count.tolist() == [2, 1]
