"""Policies that learn from preferences without a reward: DPO, cDPO, IPO from pairs, KTO from single answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch, MicroBatch
from ..data.records import Labelled, Pairs, View
from ..errors import RecipeError
from ..models.gpt_torch import logits_of
from ..strategy import Loss, Role, StepOut
from .kl import estimate
from .logprobs_torch import response_logprobs, token_logprobs
from .preferences_torch import Pairs as PairsOf
from .preferences_torch import kto, kto_reference
from .prompts import asked
from .registry import PREFERENCE_LOSSES
from .rollout_torch import LocalRollout
from .samples import collate
from .sft_torch import greedy
from .task_torch import RLTask

_MOST_DRAWN = 256  # answers of an evaluation, for KL and entropy


class _Preference(RLTask):
    """The reference's log-probabilities are computed for each batch, where the batch lies."""

    def roles(self) -> dict[str, Role]:
        """See Trainer."""
        _ = self.preference_loss  # a mistake in its options is told before anything starts
        return self.placed(super().roles() | {"reference": self.reference()})

    @functools.cached_property
    def preference_loss(self) -> Callable[..., Loss]:
        """The loss with its options."""
        raise NotImplementedError

    def step(self, batch: Batch) -> StepOut:
        """See Trainer."""
        return self.engines["model"].update(self._with_reference(batch), self.hp())

    def evaluate(self) -> dict[str, float]:
        """See Trainer."""
        assert self._eval_feed is not None, "called only where there is an evaluation split"
        batches = self._eval_feed.sweep(self.recipe.train.eval_batches)
        sums = self.engines["model"].evaluate(map(self._with_reference, batches))
        found = {name: amount / weight for name, (amount, weight) in sums.items() if weight}
        return found | greedy(self) | self._drawn()

    def _drawn(self) -> dict[str, float]:
        """KL to the reference and entropy, of answers drawn to held-out prompts; only where rewards are asked for."""
        if not self.rl.reward.all or self.eval_source is None:
            return {}
        step, records = self.cursor.step, self.records("eval")
        sampling = dataclasses.replace(self.rl.sampling, temperature=self.rl.sampling.temperature or 1.0)
        requests = asked(step, np.arange(min(len(records), _MOST_DRAWN)), 1)
        rollout = LocalRollout(self.engines["model"], self.rows, None, run_seed=self.recipe.train.seed)
        samples = rollout.samples(requests, records, sampling, version=step, max_failures=len(requests))
        arrays = {name: array for name, array in collate(samples).items() if name in ("tokens", "targets", "mask")}

        def told(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            logits = logits_of(model(batch["tokens"]))
            return token_logprobs(logits, batch["targets"], temperature=sampling.scale, mask=batch["mask"])

        mask, rows = arrays["mask"], [np.arange(len(samples))]
        own, entropy = self.rows.forward(self.engines["model"], told, arrays, rows)
        ref = self.rows.forward(self.engines["reference"], told, arrays, rows)[0]
        kl = estimate("k3", own, ref, mask).sum() / len(samples)
        return {"kl": float(kl), "entropy": float(entropy[mask].mean())}

    def _with_reference(self, batch: Batch) -> Batch:
        """The same with `ref` (rows, 2), the reference's log-probability of each completion."""
        micros = batch.micro()

        def run(model: nn.Module) -> list[Tensor]:
            return [logprobs_of(model, micro.arrays)[0] for micro in micros]

        found = self.engines["reference"].call(run)
        extended = [
            MicroBatch({**micro.arrays, "ref": ref}, micro.rows, micro.key, filler=micro.filler)
            for micro, ref in zip(micros, found, strict=True)
        ]
        return Batch(batch.step, batch.ids, lambda: extended, tokens=batch.tokens)


class DPO(_Preference):
    """`data:` records of prompt, chosen and rejected; `rl.loss` names dpo, cdpo, ipo or one of your own."""

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"loss": MappingProxyType({"name": "dpo"})})
    view: ClassVar[type[View] | None] = Pairs

    @functools.cached_property
    def preference_loss(self) -> Callable[..., Loss]:
        """See _Preference."""
        return PREFERENCE_LOSSES.bind(self.rl.loss.name, self.rl.loss.options)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The named loss over pairs; accuracy, margin and implicit rewards."""
        (chosen, rejected), counts = _columns(*logprobs_of(model, batch))
        ref_chosen, ref_rejected = batch["ref"].unbind(1)
        return self.preference_loss(PairsOf(chosen, rejected, ref_chosen, ref_rejected, *counts))


class KTO(_Preference):
    """`data:` records of prompt, completion and label (desirable or not). Options of `rl.loss`: those of kto."""

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"loss": MappingProxyType({"name": "kto"})})
    view: ClassVar[type[View] | None] = Labelled
    _kl = 0.0

    @functools.cached_property
    def preference_loss(self) -> Callable[..., Loss]:
        """See _Preference."""
        known = ("beta", "desirable_weight", "undesirable_weight")
        for name in self.rl.loss.options:
            if name not in known:
                raise RecipeError(f"rl.loss.options.{name} is no option of kto; it has {', '.join(known)}")
        return functools.partial(kto, **self.rl.loss.options)

    def roles(self) -> dict[str, Role]:
        """See Trainer."""
        roles = super().roles()
        losses = {**roles["model"].losses, "kl": self._kl_loss}
        return roles | {"model": dataclasses.replace(roles["model"], losses=losses)}

    def step(self, batch: Batch) -> StepOut:
        """See Trainer."""
        prepared = self._with_reference(batch)
        amount, weight = self.engines["model"].evaluate([prepared], "kl")["loss"]
        self._kl = max(0.0, amount / weight) if weight else 0.0
        return self.engines["model"].update(prepared, self.hp())

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """KTO's loss over rows, against the KL of the whole batch; in an evaluation, that of the last step."""
        own = {name: batch[name][:, :1] for name in ("tokens", "targets", "weight")}
        logprobs, _ = logprobs_of(model, own)
        return self.preference_loss(logprobs[:, 0], batch["ref"][:, 0], batch["label"], self._kl)

    def _kl_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        other = {name: batch[name][:, 1:] for name in ("tokens", "targets", "weight")}
        logprobs, _ = logprobs_of(model, other)
        return kto_reference(logprobs[:, 0], batch["ref"][:, 1])


def logprobs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion and its number of tokens, (rows, completions), of (rows, completions, seq)."""
    shape = batch["tokens"].shape[:2]
    tokens, targets, weight = (batch[name].flatten(0, 1) for name in ("tokens", "targets", "weight"))
    mask = weight > 0
    each, _ = token_logprobs(logits_of(model(tokens)), targets, mask=mask)
    logprobs, counts = response_logprobs(each, mask)
    return logprobs.view(shape), counts.view(shape)


def _columns(logprobs: Tensor, counts: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return torch.unbind(logprobs, 1), torch.unbind(counts, 1)
