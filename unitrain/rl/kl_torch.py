"""The KL estimators of kl.py as a term of the loss, with gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipe import one_of
from ..strategy import Loss
from .aggregate_torch import aggregated
from .kl import ESTIMATORS, MOST


def kl_loss(
    estimator: str,
    logprobs: Tensor,
    ref: Tensor,
    mask: Tensor,
    *,
    old: Tensor | None = None,
    aggregate: str = "token",
    max_tokens: int | None = None,
) -> Loss:
    """The KL of the policy against its reference as (sum, weight); all tensors (rows, tokens).

    With `old`, the policy that drew the tokens, each estimate is multiplied by pi / pi_old, and the gradient is that
    of KL(pi || ref) in expectation. Without it, for tokens drawn from the policy, the gradient of k2 is that of
    KL(pi || ref), that of k3 is of KL(ref || pi) (Shao et al., "DeepSeekMath", 2024, equation 4), that of k1 is zero.
    """
    one_of("kl.estimator", estimator, tuple(ESTIMATORS))
    logprobs = torch.where(mask, logprobs, 0)
    each = estimate(estimator, (logprobs - torch.where(mask, ref, 0)).clamp(-MOST, MOST))
    if old is not None:
        ratio = (logprobs - torch.where(mask, old, 0)).clamp(-MOST, MOST).exp()
        # k2's gradient is right as it stands: it needs the weight alone.
        each = each * (ratio.detach() if estimator == "k2" else ratio)
    return Loss(*aggregated(each, mask, aggregate, max_tokens))


def estimate(estimator: str, x: Tensor) -> Tensor:
    """k1, k2 or k3 of the log-ratios x = log pi - log ref."""
    if estimator == "k1":
        return x
    return x**2 / 2 if estimator == "k2" else torch.expm1(-x) + x
