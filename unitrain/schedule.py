"""Learning rates as pure functions of the step: nothing to save, nothing that depends on the world size."""

from __future__ import annotations

import math

from .recipe import ScheduleRecipe


def learning_rate(schedule: ScheduleRecipe, step: int, steps: int, top: float) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`.

    `wsd` is warm-up, stable, decay (Hu et al., MiniCPM, 2024), with a linear decay.
    """
    if step < schedule.warmup_steps:
        return top * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return top
    rest = max(steps - schedule.warmup_steps, 1)
    span = schedule.decay_steps or (max(rest // 10, 1) if schedule.name == "wsd" else rest)
    begin = max(steps - span, schedule.warmup_steps) if schedule.name == "wsd" else schedule.warmup_steps
    done = min(max((step - begin) / span, 0.0), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return top * (schedule.final + (1 - schedule.final) * share)
