"""What `recovery.py` kills: a Trainer, and the same training in plain torch that saves after every step.

Every rank appends a line to `steps-<rank>.jsonl` in STEPS_FOLDER at the end of each step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import unitrain

STEP_SECONDS = 0.05


def told(rank: int, step: int) -> None:
    """One line by one write."""
    line = json.dumps({"step": step, "pid": os.getpid(), "time": time.time()}) + "\n"
    with Path(os.environ["STEPS_FOLDER"], f"steps-{rank}.jsonl").open("a") as file:
        file.write(line)


def network() -> nn.Module:
    """About 0.3 million parameters."""
    return nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1))


class Recovering(unitrain.Trainer):
    """Least squares on noise."""

    def build_model(self) -> nn.Module:
        return network()

    def build_source(self, split: str) -> unitrain.Source:
        draws = np.random.default_rng(0)
        x = draws.standard_normal((256, 64)).astype(np.float32)
        return unitrain.ArraySource(x=x, y=x[:, :1].copy())

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        time.sleep(STEP_SECONDS)
        out = super().step(batch)
        out.read()
        told(self.world.rank, self.cursor.step + 1)
        return out


def main(steps: int) -> None:
    """By hand, as torch's tutorials have it: rank 0 saves model and optimizer, all ranks load them."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first, saved = 0, Path("snapshot.pt")
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    x = torch.randn(256, 64)
    for step in range(first, steps):
        time.sleep(STEP_SECONDS)
        rows = x[(step * 8 + rank * 4) % 256 :][:4]
        loss = nn.functional.mse_loss(model(rows), rows[:, :1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, "snapshot.tmp")
            Path("snapshot.tmp").replace(saved)
        told(rank, step + 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
