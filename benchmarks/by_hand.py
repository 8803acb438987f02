"""The smallest DDP script: one step on the ranks that torchrun started; rank 0 writes when it has ended."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(64, 64), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, y = torch.randn(4, 64), torch.randint(64, (4,))
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if dist.get_rank() == 0:
        found = {"time": time.time(), "loss": loss.item(), "ranks": dist.get_world_size()}
        Path(sys.argv[1], "first-step.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    time.sleep(0.05)  # else Gloo's thread, still at work, may abort the process that ends


if __name__ == "__main__":
    main()
