"""Ways in which accelerate has ranks share a model: replicas (DDP) and shards (FSDP2), each under its `Accelerator`.

accelerate reads environment variables and keeps what it finds in singletons. Both are set here from what the recipe,
the configuration file and the world say, and what came of it is checked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, TorchDynamoPlugin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from unitrain.errors import Refused, UserError
from unitrain.importers.accelerate import AccelerateConfig, FSDPConfig
from unitrain.recipe import Recipe
from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch import TorchStrategy
from unitrain.strategies._torch_engine import LossModule, Sharing, TorchEngine
from unitrain.strategies._torch_models import apply_model_options, build_model, empty_model, fill_initial
from unitrain.strategies._torch_ranks import Ranks
from unitrain.strategies._torch_replicated import Replicated, leave_buffers_alone
from unitrain.strategies._torch_sharded import Sharded, gather_in_methods, join_alone, refuse_scalars
from unitrain.strategy import Role
from unitrain.world import World, forget_variables

# What accelerate and its plugins read where they are not told otherwise.
VARIABLES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Accelerated(TorchStrategy):
    """What the ways share: an Accelerator over our ranks."""

    name: ClassVar[str] = "accelerate"
    problems = staticmethod(_torch_refusals.accelerate)

    def __init__(self, recipe: Recipe, config: AccelerateConfig) -> None:
        super().__init__(recipe)
        self.config = config

    def choose_device(self, world: World) -> torch.device:
        """The CPU where the file says so, else as ever."""
        on_cpu = self.config.use_cpu or self.config.distributed_type == "MULTI_CPU"
        return torch.device("cpu") if on_cpu else super().choose_device(world)

    def join(self, world: World) -> Ranks:
        """Meet the other ranks, then have accelerate find them as they are."""
        ranks = super().join(world)
        if not dist.is_initialized():
            self.made_group = True
            join_alone(self.backend)  # accelerate wants a process group for a single rank too
        self.accelerator = make_accelerator(self.config, world, self.device, self.arguments())
        return ranks

    def arguments(self) -> Mapping[str, Any]:
        """This way's own arguments of `Accelerator`."""
        return {}

    def close(self) -> None:
        """See Strategy."""
        forget_accelerator(self.world)
        super().close()


class Replicas(Accelerated):
    """Every rank holds the whole model, under the DistributedDataParallel that accelerate wraps around it."""

    def arguments(self) -> Mapping[str, Any]:
        """See Accelerated."""
        return {"kwargs_handlers": [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]}

    def bind(self, role: Role, seed: int) -> TorchEngine:
        """See Strategy."""
        model = build_model(role, seed, self.device)
        apply_model_options(model, self.options)
        trained = role.optimizer is not None and self.world.size > 1
        losses = LossModule(model, role.losses, self.device, precision=self.recipe.train.precision, carry=trained)
        sharing = Sharing(losses)
        if trained:
            leave_buffers_alone(losses)
            wrapped = self.accelerator.prepare(losses)
            assert isinstance(wrapped, DistributedDataParallel), "checked when the Accelerator was made"
            sharing = Replicated(losses, wrapped, self.world.size)
        return TorchEngine(model, role, sharing, self.recipe, self.ranks)


class Shards(Accelerated):
    """FSDP2: accelerate calls `fully_shard` on the units that the file's wrap policy names, and on the model."""

    def arguments(self) -> Mapping[str, Any]:
        """See Accelerated."""
        wanted = self.config.fsdp or FSDPConfig()
        compute = torch.bfloat16 if self.recipe.train.precision == "bf16" else None
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=wanted.reshard_after_forward,
            auto_wrap_policy=wanted.wrap.lower(),
            transformer_cls_names_to_wrap=list(wanted.layer_classes) or None,
            min_num_params=wanted.min_num_params,
            cpu_offload=CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if wanted.offload else OffloadPolicy(),
            mixed_precision_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
            activation_checkpointing=False,  # done by us, so that the names of parameters stay as they are
            cpu_ram_efficient_loading=False,  # initial weights are the same on every rank
        )
        return {"fsdp_plugin": plugin}

    def bind(self, role: Role, seed: int) -> TorchEngine:
        """See Strategy."""
        wanted = self.config.fsdp or FSDPConfig()
        born_sharded = role.initial is not None
        model = empty_model(role) if born_sharded else build_model(role, seed, self.device)
        refuse_scalars(model)
        checkpointing = {"activation_checkpointing": True} if wanted.activation_checkpointing else {}
        apply_model_options(model, {**self.options, **checkpointing})
        try:
            # accelerate shards a model only together with an optimizer; the engine has its own.
            self.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
        except ValueError as error:
            raise UserError(f"accelerate cannot shard the model as {self.config.file} says: {error}") from error
        gather_in_methods(model)
        sharing = Sharded(
            LossModule(model, role.losses, self.device, precision=self.recipe.train.precision), _mesh(model)
        )
        if born_sharded:
            model.to_empty(device="cpu" if wanted.offload else self.device)
            fill_initial(model, role, seed, sharing.local, sharing.offset)
        return TorchEngine(model, role, sharing, self.recipe, self.ranks)


def make_accelerator(
    config: AccelerateConfig, world: World, device: torch.device, arguments: Mapping[str, Any]
) -> Accelerator:
    """An Accelerator over a process group that exists; precision, accumulation and clipping are the engine's.

    Raises Refused where accelerate would run something else than the file says.
    """
    ignored = forget_variables(*VARIABLES)
    if ignored and world.first:
        print(f"note: the environment's {', '.join(ignored)} decide nothing here; the recipe does", flush=True)
    _describe(world, device)
    standard = {
        "cpu": device.type == "cpu",
        "mixed_precision": "no",
        "gradient_accumulation_steps": 1,
        "dynamo_plugin": TorchDynamoPlugin(backend="no"),
    }
    try:
        accelerator = Accelerator(**{**standard, **arguments})
    except (ValueError, NotImplementedError, ImportError) as error:
        raise UserError(f"accelerate refuses {config.file or 'to start'}: {error}") from error
    plugin = arguments.get("fsdp_plugin")
    if plugin is not None and device.type == "cpu":
        # accelerate takes up an FSDP plugin on GPUs only, and says nothing where it does not.
        accelerator.state.fsdp_plugin = plugin
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
    refuse_another_way(config, world, device, accelerator)
    return accelerator


def refuse_another_way(config: AccelerateConfig, world: World, device: torch.device, accelerator: Any) -> None:
    """Raise Refused where accelerate made of the file something else than it says."""
    if accelerator.num_processes != world.size:
        raise Refused(
            f"accelerate counts {accelerator.num_processes} processes where {world.size} ranks run, perhaps for an "
            "Accelerator that was made in this process before; use a fresh process, or --strategy ddp"
        )
    if accelerator.device.type != device.type:
        raise Refused(
            f"accelerate takes {accelerator.device.type} where the rank is on {device.type}; leave use_cpu out of "
            f"{config.file or 'the file'}, and hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on CPU"
        )
    found = str(accelerator.distributed_type.value)
    plain = "MULTI_CPU" if device.type == "cpu" else "MULTI_GPU"
    wanted = {"fsdp": "FSDP", "deepspeed": "DEEPSPEED", "alone": plain}.get(
        config.kind, config.distributed_type or plain
    )
    if found != wanted:
        raise Refused(
            f"{config.file or 'the recipe'} asks accelerate for {wanted}, and it would run {found} on {device.type} "
            f"here; set distributed_type: {found}, or run it where {wanted} can be had"
        )


def forget_accelerator(world: World) -> None:
    """What accelerate knows of the ranks is in singletons and variables, which would outlive them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    forget_variables(*VARIABLES)
    if world.starter == "alone":
        for name in PLACE:
            with contextlib.suppress(KeyError):
                del os.environ[name]


def _mesh(model: nn.Module) -> DeviceMesh:
    """The mesh over which accelerate sharded the model."""
    param = next(model.parameters())
    assert isinstance(param, DTensor), "the model was sharded"
    return param.device_mesh


def _describe(world: World, device: torch.device) -> None:
    """Tell accelerate who this rank is, in the variables that it reads, whoever started the rank."""
    facts: dict[str, Any] = dict(zip(PLACE, (world.rank, world.size, world.local_rank, world.local_size), strict=True))
    if world.size > 1:
        facts["MASTER_ADDR"], facts["MASTER_PORT"] = world.coordinator_address
    os.environ.update({name: str(value) for name, value in facts.items()})
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which would warn of this choice
    # Without it accelerate would choose a number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
