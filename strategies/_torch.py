"""What the torch strategies share: joining the ranks, devices, and small talk between ranks."""

from __future__ import annotations

import datetime
import functools
import itertools
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from unitrain.errors import Refused
from unitrain.keras_backend import settle_keras_device
from unitrain.strategies._torch_ranks import Ranks
from unitrain.strategy import Strategy
from unitrain.world import World

GLOO_REST_SECONDS = 0.02
JOIN_TIMEOUT = datetime.timedelta(minutes=10)
# dense bf16 FLOP/s of one device, from the vendors' data sheets; for MFU
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12, "V100": 125e12}


class TorchStrategy(Strategy):
    """Processes, devices and the control plane of a torch strategy."""

    framework = "torch"
    made_group = False  # True: the process group is ours to end

    @property
    def options(self) -> Mapping[str, Any]:
        """The recipe's `strategy.options`."""
        return self.recipe.strategy.options

    def open(self, world: World) -> None:
        """See Strategy."""
        self.world = world
        if world.threads:
            # A forked rank imported torch before it knew its share of the cores.
            torch.set_num_threads(world.threads)
        self.device = self.choose_device(world)
        settle_keras_device(str(self.device))
        self.ranks = self.join(world)

    def choose_device(self, world: World) -> torch.device:
        """This rank's GPU where there are any, else the CPU."""
        return _device(world)

    def join(self, world: World) -> Ranks:
        """Meet the other ranks; a process group that somebody has made already is used as it is."""
        self.made_group = world.size > 1 and not dist.is_initialized()
        if self.made_group:
            dist.init_process_group(
                self.backend, store=_meeting(world), rank=world.rank, world_size=world.size, timeout=JOIN_TIMEOUT
            )
        return Ranks(world.rank, world.size)

    @property
    def backend(self) -> str:
        """Collectives of this device, and gloo beside NCCL for what lives on the host."""
        return "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"

    def place(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """See Strategy."""
        placed = {}
        for name, array in arrays.items():
            # torch would share a read-only array (a memory map) and warn that writes are undefined.
            tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
            if self.device.type == "cuda":
                tensor = tensor.pin_memory().to(self.device, non_blocking=True)
            placed[name] = tensor
        return placed

    def share(self, text: str) -> str:
        """See Strategy."""
        return self.ranks.share(text)

    def barrier(self) -> None:
        """See Strategy."""
        self.ranks.barrier()

    def memory_bytes(self) -> int:
        """See Strategy."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else super().memory_bytes()

    def peak_flops(self) -> float | None:
        """See Strategy."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)

    def close(self) -> None:
        """See Strategy."""
        if self.made_group and dist.is_initialized():
            dist.destroy_process_group()
            # Gloo's thread takes the GIL to drop its last tensors; it aborts the process if Python is ending by then.
            time.sleep(GLOO_REST_SECONDS)


def _refuse_more_ranks_than_devices(local_rank: int, num_devices: int) -> None:
    """Raise Refused when this rank has no device of its own."""
    if local_rank >= num_devices:
        raise Refused(
            f"rank {local_rank} of this node has no GPU: {num_devices} are visible; use --nproc {num_devices}, or hide "
            "them all (CUDA_VISIBLE_DEVICES=) to train on CPU"
        )


_MEETINGS = itertools.count()  # of this process; the ranks of a run count alike


def _meeting(world: World) -> Any:
    """Where the ranks meet this time. A second run of one process must not find what the first one left there."""
    store = store_of(world.coordinator, world.rank, world.size)
    return torch._C._distributed_c10d.PrefixStore(f"meeting-{next(_MEETINGS)}", store)


@functools.cache
def store_of(coordinator: str, rank: int, size: int) -> Any:
    """The key-value store that all ranks reach.

    One a process: a rank that is ahead could still reach the store that rank 0 is about to end.
    """
    return next(rendezvous(f"tcp://{coordinator}", rank, size, timeout=JOIN_TIMEOUT))[0]


def _device(world: World) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    _refuse_more_ranks_than_devices(world.local_rank, torch.cuda.device_count())
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device
