"""The smallest run on two ranks, by a Trainer; `by_hand.py` is the same without one."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from unitrain import Batch, Source, StepOut, Trainer
from unitrain.data.arrays import ArraySource


class FirstStep(Trainer):
    """Writes down when its first step has ended."""

    def build_model(self) -> nn.Module:
        return nn.Linear(64, 64)

    def build_source(self, split: str) -> Source | None:
        draw = np.random.default_rng(0)
        x, y = draw.standard_normal((64, 64)).astype(np.float32), draw.integers(0, 64, 64)
        return ArraySource(x=x, y=y) if split == "train" else None

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    def step(self, batch: Batch) -> StepOut:
        out = super().step(batch)
        loss = float(out.loss)
        if self.world.first and self.run is not None:
            found = {"time": time.time(), "loss": loss, "ranks": self.world.size}
            (self.run.folder / "first-step.json").write_text(json.dumps(found))
        return out
