"""Which devices torch sees here, and how fast ranks sum by gloo: for `unitrain doctor`."""

from __future__ import annotations

import datetime
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unitrain.world import World

BYTES, ROUNDS = 16 << 20, 3
TIMEOUT = datetime.timedelta(seconds=60)


def probe(world: World, coordinator: str) -> dict[str, Any]:
    """Devices of this rank's machine; bytes, and seconds of the fastest of a few all-reduces of them over all ranks.

    Raises RuntimeError where the ranks do not find each other, or sum wrongly.
    """
    found = _devices()
    if world.size == 1:
        return {**found, "bytes": BYTES, "seconds": 1e-9}
    store_host, _, port = coordinator.rpartition(":")
    # of the public API, though torch does not say so to type checkers
    store = dist.TCPStore(store_host, int(port), world.size, world.first, timeout=TIMEOUT)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    try:
        return {**found, "bytes": BYTES, "seconds": min(_round(world) for _ in range(ROUNDS + 1))}
    finally:
        dist.destroy_process_group()


def _round(world: World) -> float:
    data = torch.full((BYTES // 4,), float(world.rank + 1))
    dist.barrier()
    begun = time.perf_counter()
    dist.all_reduce(data)
    seconds = time.perf_counter() - begun
    wanted = world.size * (world.size + 1) / 2
    if not torch.all(data == wanted):
        raise RuntimeError(f"the sum of {world.size} ranks is {data[0].item():g}, and should be {wanted:g}")
    return seconds


def _devices() -> dict[str, Any]:
    files = len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()  # it warns of a driver that is too old
    why = str(said[-1].message).splitlines()[0] if said else f"built for CUDA {torch.version.cuda or 'not at all'}"
    count = torch.cuda.device_count() if there else 0
    name = torch.cuda.get_device_name(0) if count else ""
    return {"version": torch.__version__, "gpus": count, "gpu": name, "device_files": files, "why": why}
