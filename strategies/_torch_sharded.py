"""Models whose parameters are sharded by torch's `fully_shard`, whoever called it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from unitrain.errors import UserError
from unitrain.strategies._torch_engine import LossModule, Sharing, norm_of


def refuse_scalars(model: nn.Module) -> None:
    """Raise UserError for a parameter that has no rows to shard."""
    scalars = [name for name, param in model.named_parameters() if param.ndim == 0]
    if scalars:
        raise UserError(
            f"fsdp2 cannot shard the scalar parameter {scalars[0]!r}; give it the shape (1,), or use --strategy ddp"
        )


def join_alone(backend: str) -> None:
    """A process group of one rank: a mesh wants one."""
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


def gather_in_methods(model: nn.Module) -> None:
    """Losses may call other methods of the model than forward; those must gather parameters too."""
    for name, _ in inspect.getmembers(type(model), inspect.isfunction):
        if (
            not name.startswith("_")
            and name != "forward"
            and not hasattr(FSDPModule, name)
            and not hasattr(nn.Module, name)
        ):
            register_fsdp_forward_method(model, name)


class Sharded(Sharing):
    """Rows of every parameter over the ranks of the mesh's last dimension."""

    def __init__(self, losses: LossModule, mesh: DeviceMesh) -> None:
        super().__init__(losses)
        self.divisor = mesh.size()
        self.writes = mesh.ndim == 1 or mesh.get_local_rank("replicate") == 0
        self.root: Any = losses.model
        self.syncs = True

    def before_micro(self, last: bool) -> None:
        """See Sharing."""
        if self.syncs != last:
            self.syncs = last
            self.root.set_requires_gradient_sync(last)

    def totals_and_norm(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See Sharing. The loss and weight ride with the norm's own all-reduce."""
        totals = self.losses.totals
        assert totals is not None, "a backward pass came before"
        square = norm_of(grads).to(totals.device).square() * float(self.writes)
        table = torch.cat((square.reshape(1), totals / self.divisor))
        if self.divisor > 1:
            dist.all_reduce(table)
        device = grads[0].device if grads else table.device
        return table[1:].to(device), table[0].sqrt().to(device)

    def local(self, tensor: Tensor) -> Tensor:
        """See Sharing."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def offset(self, tensor: Tensor) -> tuple[int, ...] | None:
        """See Sharing. Shards are cut as torch.chunk cuts: all of one size but the last ones."""
        if not isinstance(tensor, DTensor):
            return None
        begin = [0] * tensor.ndim
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                rows, ranks = tensor.shape[placement.dim], tensor.device_mesh.size(axis)
                chunk = -(-rows // ranks)
                begin[placement.dim] = min(tensor.device_mesh.get_local_rank(axis) * chunk, rows)
        return tuple(begin)

    def after_forward_only(self) -> None:
        """See Sharing. Without a backward pass the root keeps its gathered parameters: they may grow stale."""
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
