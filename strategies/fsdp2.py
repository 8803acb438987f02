"""PyTorch FSDP2: parameters, gradients and moments are sharded over the ranks (Zhao et al., "PyTorch FSDP", 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch import TorchStrategy
from unitrain.strategies._torch_engine import LossModule, TorchEngine
from unitrain.strategies._torch_models import (
    apply_model_options,
    build_model,
    empty_model,
    fill_initial,
    separate_units,
)
from unitrain.strategies._torch_sharded import Sharded, gather_in_methods, join_alone, refuse_scalars
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
        refuse_scalars(model)
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
            self.made_group = True
            join_alone(self.backend)
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
        for unit in separate_units(model):
            fully_shard(unit, **arguments)
        fully_shard(model, **arguments)
        gather_in_methods(model)
