"""What moves a policy towards its better samples: a loss for each token, by name, and what all of them share.

A policy loss is a function (Tokens, *, options) -> PerToken. Masks, importance weights, normalisers and common
metrics are `policy_loss`'s business, so that research code writes one formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..recipe import above, at_least
from ..strategy import Loss
from .aggregate_torch import aggregated
from .kl import MOST
from .registry import POLICY_LOSSES


class Tokens(NamedTuple):
    """All (rows, tokens). A policy loss sees 0 in masked places of the others, whatever stood there."""

    logprobs: Tensor  # of the policy, with gradient
    old: Tensor  # of the policy before the step's first update
    advantages: Tensor
    mask: Tensor  # bool: tokens that are learnt

    def ratio(self) -> Tensor:
        """pi / pi_old of each token; exp(20) at most, where gradients vanish."""
        return (self.logprobs - self.old).clamp(-MOST, MOST).exp()


class PerToken(NamedTuple):
    """The loss of each token, and metrics of each token, all (rows, tokens)."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = {}


def policy_loss(
    function: str | Callable[[Tokens], PerToken],
    tokens: Tokens,
    *,
    weights: Tensor | None = None,
    aggregate: str = "token",
    max_tokens: int | None = None,
) -> Loss:
    """The loss of a (micro-)batch as (sum, weight), by the name of a policy loss or a function with its options bound.

    `weights` (rows, tokens) are importance weights for samples of another policy. Metrics are means over tokens:
    ratio, approx_kl (k3 of pi_old against pi) and the function's own.
    """
    chosen = POLICY_LOSSES.get(function) if isinstance(function, str) else function
    mask = tokens.mask
    logprobs, old, advantages = (torch.where(mask, values, 0) for values in tokens[:3])
    clean = Tokens(logprobs, old, advantages, mask)
    found = chosen(clean)
    loss = found.loss if weights is None else found.loss * torch.where(mask, weights, 0).to(found.loss.dtype)
    with torch.no_grad():
        ratio = clean.ratio()
        metrics = {"ratio": ratio, "approx_kl": ratio - 1 - ratio.log(), **found.metrics}
        means = {name: aggregated(values.detach(), mask) for name, values in metrics.items()}
    return Loss(*aggregated(loss, mask, aggregate, max_tokens), means)


def ppo(tokens: Tokens, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None) -> PerToken:
    """max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)): Schulman et al., 2017, equation 7.

    clip_high above clip_low leaves room for unlikely tokens (Yu et al., "DAPO", 2025, section 3.1). `dual_clip` c
    bounds the loss of tokens with A < 0 by -c A (Ye et al., 2020, equation 5; c = 3 there).
    """
    _check_clips(clip_low, clip_high)
    ratio, advantages = tokens.ratio(), tokens.advantages
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    metrics = {"clip_fraction": (clipped > plain).to(loss.dtype)}
    if dual_clip is not None:
        above("the option dual_clip of ppo", dual_clip, 1)
        bound = -advantages * dual_clip
        bounded = (advantages < 0) & (loss > bound)
        metrics["dual_clip_fraction"] = bounded.to(loss.dtype)
        loss = torch.where(bounded, bound, loss)
    return PerToken(loss, metrics)


def gspo(tokens: Tokens, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> PerToken:
    """PPO's clipping of one ratio a sample, the geometric mean of its tokens' (Zheng et al., 2025, equations 7, 13).

    In the form for single tokens: its value is the sample's ratio, its gradient each token's own. Meant for
    `aggregate: sequence`.
    """
    _check_clips(clip_low, clip_high)
    counts = tokens.mask.sum(dim=1, keepdim=True).clamp(min=1)
    whole = ((tokens.logprobs - tokens.old).sum(dim=1, keepdim=True) / counts).clamp(-MOST, MOST).detach().exp()
    ratio = whole * (tokens.logprobs - tokens.logprobs.detach()).exp()
    plain = -tokens.advantages * ratio
    clipped = -tokens.advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return PerToken(torch.maximum(plain, clipped), {"clip_fraction": (clipped > plain).to(plain.dtype)})


def cispo(tokens: Tokens, *, clip_low: float | None = None, clip_high: float = 4.0) -> PerToken:
    """-A log pi x the ratio, clipped and without gradient, so that no token loses its own (MiniMax-M1, 2025, eq. 4).

    The ratio is at most 1 + clip_high and, unless clip_low is None, at least 1 - clip_low.
    """
    at_least("the option clip_high of cispo", clip_high, 0)
    ratio = tokens.ratio().detach()
    clipped = ratio.clamp(None if clip_low is None else 1 - clip_low, 1 + clip_high)
    loss = -clipped * tokens.advantages * tokens.logprobs
    return PerToken(loss, {"clip_fraction": (clipped != ratio).to(loss.dtype)})


def value_loss(
    values: Tensor,
    old: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    aggregate: str = "token",
    max_tokens: int | None = None,
) -> Loss:
    """Half the squared error of a critic, no less than with its step from `old` clipped to +-clip; all (rows, tokens).

    0.5 max((V - R)^2, (V_old + clip(V - V_old) - R)^2): Schulman et al.'s implementation of PPO; Huang et al., "The
    37 Implementation Details of PPO", 2022, item 9. `clip` None: the plain error.
    """
    values, old, returns = (torch.where(mask, each, 0) for each in (values, old, returns))
    error = (values - returns) ** 2
    beyond = torch.zeros_like(error)
    if clip is not None:
        above("rl.value_clip", clip, 0)
        clipped = (old + (values - old).clamp(-clip, clip) - returns) ** 2
        beyond = (clipped > error).to(error.dtype)
        error = torch.maximum(error, clipped)
    with torch.no_grad():
        metrics = {"value_clip_fraction": aggregated(beyond, mask), "value": aggregated(values.detach(), mask)}
    return Loss(*aggregated(error / 2, mask, aggregate, max_tokens), metrics)


def _check_clips(low: float, high: float) -> None:
    for name, value in (("clip_low", low), ("clip_high", high)):
        at_least(f"the option {name}", value, 0)
