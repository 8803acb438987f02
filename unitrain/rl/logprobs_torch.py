"""Log-probabilities and entropies of tokens from logits, without a second copy of the logits in fp32.

The only definition: generation and training both use it, so that the two agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST_NUMBERS = 1 << 24  # in fp32 at a time: 64 MiB


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    most: int = MOST_NUMBERS,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities of the targets, entropies in nats), both of targets' shape, in fp32 (fp64 stays fp64).

    logits (..., vocab) of any float type, targets (...), int64. Both results have gradients. Where `mask` is False
    results are 0, and no gradient comes from there, even from logits that are NaN. Goes over the vocabulary in parts
    of at most `most` numbers; what it keeps for the gradient is the logits themselves and two numbers a token.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    kept = torch.ones(len(flat), dtype=torch.bool, device=flat.device) if mask is None else mask.reshape(-1)
    apply: Any = _TokenLogprobs.apply
    logprobs, entropy = apply(flat, targets.reshape(-1), kept, temperature, most)
    return logprobs.view(targets.shape), entropy.view(targets.shape)


def response_logprobs(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's sum of log-probabilities over unmasked tokens, and how many these are; both (rows,)."""
    return torch.where(mask, logprobs, 0).sum(dim=1), mask.sum(dim=1)


class _TokenLogprobs(torch.autograd.Function):
    """With z = logits / temperature and p = softmax(z):

    d logprob / d z = onehot - p        d entropy / d z = -p (log p + entropy)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, kept: Tensor, temperature: float, most: int) -> Any:
        rows, vocab = logits.shape
        kind = _wide(logits)
        highest = torch.full((rows,), -torch.inf, dtype=kind, device=logits.device)
        total, weighted = torch.zeros_like(highest), torch.zeros_like(highest)  # of exp(z - highest), and times z
        for part in _parts(rows, vocab, most):
            z = _scaled(logits[:, part], kept, temperature)
            top = torch.maximum(highest, z.amax(dim=1))
            shrink, power = torch.exp(highest - top), torch.exp(z - top[:, None])
            total = total * shrink + power.sum(dim=1)
            # A token ruled out by a logit of -inf adds nothing to the entropy.
            weighted = weighted * shrink + torch.where(power > 0, power * z, 0).sum(dim=1)
            highest = top
        log_total = highest + total.log()
        chosen = logits.gather(1, targets[:, None])[:, 0].to(kind) / temperature
        logprobs = torch.where(kept, chosen - log_total, 0)
        entropy = torch.where(kept, log_total - weighted / total, 0)
        ctx.save_for_backward(logits, targets, kept, log_total, entropy)
        ctx.temperature, ctx.most = temperature, most
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropy: Tensor) -> Any:
        logits, targets, kept, log_total, entropy = ctx.saved_tensors
        of_logprobs, of_entropy = (torch.where(kept, each, 0)[:, None] for each in (of_logprobs, of_entropy))
        gradient = torch.empty_like(logits)
        for part in _parts(len(logits), logits.shape[1], ctx.most):
            log_p = _scaled(logits[:, part], kept, ctx.temperature) - log_total[:, None]
            p = log_p.exp()
            z = -p * of_logprobs - torch.where(p > 0, p * (log_p + entropy[:, None]), 0) * of_entropy
            gradient[:, part] = (z / ctx.temperature).to(gradient.dtype)
        # The target's own in one piece: added to what stands there, low precision would round twice.
        log_p = _scaled(logits.gather(1, targets[:, None]), kept, ctx.temperature) - log_total[:, None]
        p = log_p.exp()
        z = (1 - p) * of_logprobs - p * (log_p + entropy[:, None]) * of_entropy
        gradient.scatter_(1, targets[:, None], torch.where(kept[:, None], z / ctx.temperature, 0).to(gradient.dtype))
        return gradient, None, None, None, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _scaled(logits: Tensor, kept: Tensor, temperature: float) -> Tensor:
    return torch.where(kept[:, None], logits, 0).to(_wide(logits)) / temperature


def _parts(rows: int, vocab: int, most: int) -> list[slice]:
    width = max(256, most // max(rows, 1))
    return [slice(begin, min(begin + width, vocab)) for begin in range(0, vocab, width)]
