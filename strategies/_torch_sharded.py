"""Models whose parameters are sharded by torch's `fully_shard`, whoever called it."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from unitrain.batch import MicroBatch
from unitrain.errors import UserError
from unitrain.keras_backend import is_keras
from unitrain.strategies._torch_engine import LossModule, Sharing, norm_of

NO_PASSES = ("forward", "manual_seed", "reset_buffers", "sharding_units")  # methods that need no gathering of ours


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
    keras: Any = sys.modules.get("keras")
    bases = [nn.Module, *([keras.Model] if is_keras(model) else [])]  # what is theirs is no way to run the model
    for name, _ in inspect.getmembers(type(model), inspect.isfunction):
        if (
            not name.startswith("_")
            and name not in NO_PASSES
            and not hasattr(FSDPModule, name)
            and not any(hasattr(base, name) for base in bases)
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
        self.num_watched = 0  # parameters; 0 until the first update, and on a single rank
        self.reached: set[int] = set()  # by this rank's rows in this update, of those that are watched

    def before_update(self, loss: str, first: MicroBatch) -> None:
        """See Sharing."""
        if not self.num_watched and self.divisor > 1:
            self._watch()
        self.reached.clear()

    def _watch(self) -> None:
        """Have ranks meet in the same reduce-scatters whichever parameters their rows lead to, and note which.

        Left to itself, FSDP2 would add up gradients of different parameters, or abort.
        """
        self.root.set_reduce_scatter_unused_params(True)
        for module in self.root.modules():
            if not isinstance(module, FSDPModule):
                continue
            module.unshard()
            trained = [param for param in self.root.parameters() if param.requires_grad]
            for number, param in enumerate(trained):
                if not isinstance(param, DTensor):  # this module's, whole for the moment: it lasts
                    param.register_post_accumulate_grad_hook(functools.partial(self._arrived, number))
            module.reshard()
        self.num_watched = len(trained)

    def _arrived(self, number: int, param: Tensor) -> None:
        self.reached.add(number)

    def before_micro(self, last: bool) -> None:
        """See Sharing."""
        if self.syncs != last:
            self.syncs = last
            self.root.set_requires_gradient_sync(last)

    def totals_and_norm(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See Sharing. The loss and weight ride with the norm's own all-reduce, and who reached which parameter."""
        totals = self.losses.totals
        assert totals is not None, "a backward pass came before"
        square = norm_of(grads).to(totals.device).square() * float(self.writes)
        missed = [number for number in range(self.num_watched) if number not in self.reached]
        reached = totals.new_ones(self.num_watched)
        if missed:
            reached[missed] = 0
        table = torch.cat((square.reshape(1), totals / self.divisor, reached))
        if self.divisor > 1:
            dist.all_reduce(table)
        by_all = table[3:].tolist() if missed else []  # only such a step waits for the device
        self.unused = [number for number in missed if not by_all[number]]
        device = grads[0].device if grads else table.device
        return table[1:3].to(device), table[0].sqrt().to(device)

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
