"""Supervised fine-tuning: the completions of records are learnt, their prompts are not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..data.records import Records
from ..data.source import Source
from ..models.gpt_torch import same_text
from ..models.hf_config import HF
from ..strategy import Loss
from ..tasks import language_model_torch
from .packing import Packed
from .prompts import asked
from .rewards import Reward, Rewards
from .rollout_torch import LocalRollout, means
from .task_torch import RLTask


class SFT(RLTask):
    """With `rl.reward`, evaluation also reports the mean reward of greedy responses to the held-out prompts.

    With `rl.packing`, a row holds as many examples as fit, and `train.global_batch` counts such rows.
    """

    packs: ClassVar[bool] = True

    def build_source(self, split: str) -> Source | None:
        """See Trainer."""
        source = super().build_source(split)
        return Packed(source) if self.rl.packing and isinstance(source, Records) else source

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Loss:
        """Cross entropy in nats over the tokens of completions."""
        return language_model_torch.loss(self, packed(model, batch, transformers=isinstance(self.config, HF)), batch)

    def evaluate(self) -> dict[str, float]:
        """See Trainer."""
        return super().evaluate() | greedy(self)


def packed(model: Any, batch: Mapping[str, Any], *, transformers: bool) -> Any:
    """The model, told which tokens of the batch belong together; as it is where rows hold one text each."""
    if "segments" not in batch:
        return model
    segments, positions = batch["segments"].long(), batch["positions"].long()
    if not transformers:
        return functools.partial(model, segments=segments, positions=positions)
    seen = same_text(segments)
    unseen = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)
    return functools.partial(model, attention_mask=unseen, position_ids=positions, use_cache=False)


def greedy(task: RLTask) -> dict[str, float]:
    """Mean reward and length of the likeliest responses to the held-out prompts; empty without reward functions."""
    functions, train = task.rl.reward.all, task.recipe.train
    if not functions or task.eval_source is None:
        return {}
    records, sampling = task.records("eval"), dataclasses.replace(task.rl.sampling, temperature=0.0)
    limit = len(records) if train.eval_batches is None else min(len(records), train.eval_batches * train.global_batch)
    step = task.cursor.step
    requests = asked(step, np.arange(limit), 1)
    at_once = max(train.global_batch * task.rl.samples_per_prompt, 1)
    with rewards_of(task) as rewards:
        rollout = LocalRollout(task.engines["model"], task.rows, rewards, run_seed=train.seed)
        found = [
            sample
            for begin in range(0, limit, at_once)
            for sample in rollout.samples(
                requests[begin : begin + at_once], records, sampling, version=step, max_failures=limit
            )
        ]
    return means(found)


def rewards_of(task: RLTask) -> Rewards:
    """The recipe's reward functions, with processes of their own."""
    reward = task.rl.reward
    return Rewards(
        [Reward(each.function, each.weight, each.name) for each in reward.all],
        processes=reward.processes,
        limit_seconds=reward.limit_seconds,
        retries=reward.retries,
    )
