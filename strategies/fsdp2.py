"""PyTorch FSDP2: parameters, gradients and moments are sharded over the ranks (Zhao et al., "PyTorch FSDP", 2023)."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from unitrain.errors import UserError
from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch import TorchStrategy
from unitrain.strategies._torch_engine import LossModule, Sharing, TorchEngine, norm_of
from unitrain.strategies._torch_models import (
    apply_model_options,
    build_model,
    empty_model,
    fill_initial,
    sharding_units,
)
from unitrain.strategy import Role

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FSDP2(TorchStrategy):
    """`fully_shard` over the model's blocks and the model.

    Options: reshard_after_forward (True: gather again for backward; False: keep; a number: reshard to groups of that
    many ranks), shard_size (ranks of one shard group; the groups hold replicas: HSDP), cpu_offload, param_dtype and
    reduce_dtype (fp32, bf16, fp16), activation_checkpointing, compile.
    """

    name: ClassVar[str] = "fsdp2"
    problems = staticmethod(_torch_refusals.fsdp2)

    def bind(self, role: Role, seed: int) -> TorchEngine:
        """See Strategy."""
        mesh = self._mesh()
        born_sharded = role.initial is not None
        model = empty_model(role) if born_sharded else build_model(role, seed, self.device)
        _check_shapes(model)
        apply_model_options(model, self.options)
        self._shard(model, mesh)
        sharing = Sharded(LossModule(model, role.losses, self.device, precision=self.recipe.train.precision), mesh)
        if born_sharded:
            model.to_empty(device="cpu" if self.options.get("cpu_offload") else self.device)
            fill_initial(model, role, seed, sharing.local, sharing.offset)
        return TorchEngine(model, role, sharing, self.recipe, self.ranks)

    def _mesh(self) -> DeviceMesh:
        """One dimension of all ranks, or (replicas, shards) with `shard_size`."""
        size, ranks = self.options.get("shard_size"), self.world.size
        if not dist.is_initialized():
            # One rank: a mesh still wants a process group.
            self.made_group = True
            store = torch._C._distributed_c10d.HashStore()
            dist.init_process_group(self.backend, store=store, rank=0, world_size=1)
        if size is None or size == ranks:
            return init_device_mesh(self.device.type, (ranks,), mesh_dim_names=("shard",))
        return init_device_mesh(self.device.type, (ranks // size, size), mesh_dim_names=("replicate", "shard"))

    def _shard(self, model: nn.Module, mesh: DeviceMesh) -> None:
        options = self.options
        compute = {"bf16": "bf16"}.get(self.recipe.train.precision)
        param, reduce = options.get("param_dtype", compute), options.get("reduce_dtype", "fp32")
        offload = (
            CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if options.get("cpu_offload") else OffloadPolicy()
        )
        arguments: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=DTYPES[param] if param else None, reduce_dtype=DTYPES[reduce] if reduce else None
            ),
            "offload_policy": offload,
        }
        if "reshard_after_forward" in options:
            arguments["reshard_after_forward"] = options["reshard_after_forward"]
        for unit in sharding_units(model):
            fully_shard(unit, **arguments)
        fully_shard(model, **arguments)
        # Losses may call other methods of the model than forward; those must gather parameters too.
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


def _check_shapes(model: nn.Module) -> None:
    scalars = [name for name, param in model.named_parameters() if param.ndim == 0]
    if scalars:
        raise UserError(
            f"fsdp2 cannot shard the scalar parameter {scalars[0]!r}; give it the shape (1,), or use --strategy ddp"
        )
