"""DeepSpeed beside our own process group: joining it, its configuration, and its engine around a role."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unitrain.build.deepspeed import ensure, settle_accelerator
from unitrain.errors import Refused
from unitrain.recipe import OptimizerRecipe
from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch import TorchStrategy
from unitrain.strategies._torch_engine import COMPUTE, LossModule, Sharing, TorchEngine
from unitrain.strategies._torch_models import (
    apply_model_options,
    build_model,
    empty_model,
    reset_buffers,
    sharding_units,
)
from unitrain.strategies._torch_ranks import Ranks
from unitrain.strategy import Role
from unitrain.world import World

settle_accelerator()

import deepspeed  # noqa: E402 - it looks for an accelerator when it is imported
from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.runtime.engine import ZERO_OPTIMIZATION  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import is_zero_param  # noqa: E402
from deepspeed.utils import groups  # noqa: E402

from unitrain.strategies._torch_deepspeed_engine import DeepSpeedEngine, Partitioned, RootModule  # noqa: E402

LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default, which it allocates however small the model is


class DeepSpeedStrategy(TorchStrategy):
    """ZeRO by `deepspeed.initialize`. Options are a DeepSpeed configuration; a strategy is a stage and an offload."""

    stage: int
    offloads: tuple[str, ...] = ()  # what leaves the device: offload_optimizer, offload_param

    def open(self, world: World) -> None:
        """See Strategy."""
        self.engines: list[DeepSpeedEngine] = []
        self.scratch: str | None = None
        super().open(world)
        self._ensure_operators()
        if self.options.get("offload") == "nvme":
            # A folder of this rank's own: swap files of two runs would have the same names.
            folder = Path(self.options["nvme_path"])
            folder.mkdir(parents=True, exist_ok=True)
            self.scratch = tempfile.mkdtemp(prefix=f"unitrain-rank{world.rank}-", dir=folder)

    def join(self, world: World) -> Ranks:
        """See TorchStrategy. DeepSpeed takes our process group, and wants one for a single rank too."""
        if self.recipe.train.precision == "fp16" and self.device.type == "cpu":
            raise Refused("DeepSpeed has no fp16 on CPU; use train.precision: bf16 or fp32")
        ranks = super().join(world)
        if not dist.is_initialized():
            from unitrain.strategies._torch_sharded import join_alone  # which imports all of FSDP

            self.made_group = True
            join_alone(self.backend)
        os.environ["LOCAL_RANK"] = str(world.local_rank)  # zero.Init reads it, and not every starter sets it
        # DeepSpeed calls what torch is about to rename.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        with _quiet(), _no_shared_memory_operator():
            deepspeed.init_distributed(dist_backend=self.backend, auto_mpi_discovery=False, verbose=False)
        return ranks

    def bind(self, role: Role, seed: int) -> TorchEngine:
        """See Strategy."""
        if role.optimizer is not None and not isinstance(role.optimizer, OptimizerRecipe):
            raise Refused(
                f"{self.name} flattens and cuts parameters, which an optimizer of a role's own may not stand; use the "
                "recipe's optimizer (adamw, sgd), or --strategy ddp or fsdp2"
            )
        precision = self.recipe.train.precision
        if role.optimizer is None and self.stage < 3:
            model = build_model(role, seed, self.device)
            apply_model_options(model, _model_options(self.options))
            return TorchEngine(
                model,
                role,
                Sharing(LossModule(model, role.losses, self.device, precision=precision)),
                self.recipe,
                self.ranks,
            )
        return self._wrap(role, seed)

    def _wrap(self, role: Role, seed: int) -> DeepSpeedEngine:
        """A DeepSpeed engine around the role."""
        compute = COMPUTE[self.recipe.train.precision]
        born_sharded = self.stage == 3 and role.initial is not None
        model = empty_model(role) if born_sharded else build_model(role, seed, self.device)
        self._refuse_scalars(model)
        trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        config = self._sized(model)
        masters: dict[str, Tensor] = {}
        if compute is not None and role.optimizer is not None and role.initial is None:
            # DeepSpeed would make the masters from weights that were rounded before.
            masters = {name: param.detach().float().cpu().clone() for name, param in trained.items()}
        if self.stage == 3:
            _partition(model, role, seed, self.device, config, compute or torch.float32)
            trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        apply_model_options(model, _model_options(self.options))
        root = RootModule(model, role.losses, self.device, precision=self.recipe.train.precision)
        optimizer = None
        if isinstance(role.optimizer, OptimizerRecipe):
            optimizer = self._optimizer(role.optimizer, list(trained.values()))
        with _quiet(), _one_kind_of_optimizer():
            engine = self.initialize(root, optimizer, config)
        bound = DeepSpeedEngine(engine, model, role, Partitioned(root, self.world.size), self.recipe, self.ranks)
        if bound.partitions is None:
            return bound
        if compute is not None:
            bound.partitions.fill(lambda name, shape: masters[name] if masters else _initial(role, name, shape, seed))
        for other in self.engines:
            other.neighbours.append(bound)
        bound.neighbours = list(self.engines)
        self.engines.append(bound)
        return bound

    def _refuse_scalars(self, model: nn.Module) -> None:
        """Raise Refused for a parameter that DeepSpeed cannot send as bytes."""
        for name, param in model.named_parameters():
            if param.ndim == 0:
                raise Refused(
                    f"{self.name} cannot share the scalar parameter {name!r}; give it the shape (1,), or use "
                    "--strategy ddp"
                )

    def _sized(self, model: nn.Module) -> dict[str, Any]:
        """The configuration for this model: DeepSpeed's buffers have one size, however small the model is."""
        config = self.configuration()
        sizes = [param.numel() for param in model.parameters()]
        zero = config["zero_optimization"]
        zero.setdefault("reduce_bucket_size", min(LARGEST_BUCKET, sum(sizes)) or 1)
        if zero.get("offload_param", {}).get("device") == "nvme":
            zero["offload_param"].setdefault("buffer_size", max(sizes, default=1))
        return config

    def initialize(self, root: RootModule, optimizer: torch.optim.Optimizer | None, config: dict[str, Any]) -> Any:
        """DeepSpeed's own engine for this root; accelerate has another way to it."""
        engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=config, dist_init_required=False)
        return engine

    def configuration(self) -> dict[str, Any]:
        """The user's configuration, completed by what the recipe says."""
        options = copy.deepcopy(
            {name: value for name, value in self.options.items() if name not in _torch_refusals.ZERO_OWN}
        )
        config = {
            name: value
            for name, value in options.items()
            if not isinstance(value, bool) or name not in _torch_refusals.COMMON
        }
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = self.stage
        device = self.options.get("offload", "cpu")
        for part in self.offloads:
            own = zero.setdefault(part, {})
            own.setdefault("pin_memory", self.device.type == "cuda")
            own["device"] = device
            if device == "nvme":
                own["nvme_path"] = self.scratch
        precision = self.recipe.train.precision
        if precision == "bf16":
            config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        elif precision == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": 1.0}  # ours multiplies the loss itself
        config.setdefault("communication_data_type", "fp32")
        return config | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0,  # set anew in each step
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    def _optimizer(self, recipe: OptimizerRecipe, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed gives flat partitions to."""
        by_decay: dict[float, list[nn.Parameter]] = {}
        for param in params:
            decay = recipe.weight_decay if recipe.decay == "all" or len(_shape(param)) >= 2 else 0.0
            by_decay.setdefault(decay, []).append(param)
        found = [{"params": members, "weight_decay": decay} for decay, members in by_decay.items()]
        if recipe.name == "sgd":
            return torch.optim.SGD(found, lr=recipe.lr, momentum=recipe.momentum)
        if "offload_optimizer" in self.offloads:
            with _quiet():
                cpu_adam: torch.optim.Optimizer = DeepSpeedCPUAdam(
                    found, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, adamw_mode=True
                )
            return cpu_adam
        return torch.optim.AdamW(found, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)

    def _ensure_operators(self) -> None:
        """Compile what this strategy needs before anything is measured, on one rank a node, and say so."""
        wanted = ["cpu_adam"] if "offload_optimizer" in self.offloads else []
        if self.options.get("offload") == "nvme":
            wanted.append("async_io")
        if not wanted:
            return
        for turn in (self.world.local_rank == 0, self.world.local_rank != 0):
            if turn:
                ensure(wanted, say=lambda line: print(line, flush=True))
            self.ranks.barrier()

    def close(self) -> None:
        """See Strategy."""
        with contextlib.suppress(Exception):  # after a failure DeepSpeed's state may be anything
            for bound in self.engines:
                bound.engine.destroy()
        self.engines = []
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
        if self.made_group:
            groups._release_process_group_references()  # a later run in this process has groups of its own
        super().close()


def _model_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Ours among options of the same name as DeepSpeed's: those that only say yes or no."""
    return {name: options[name] for name in _torch_refusals.COMMON if isinstance(options.get(name), bool)}


def _partition(
    model: nn.Module, role: Role, seed: int, device: torch.device, config: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Cut a model into ZeRO-3's partitions, block by block; one that was built empty gets its initial values so.

    Left to itself, DeepSpeed would do this as well, but keep the parameters of a CPU in bf16 on NVMe.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    filled: dict[int, nn.Parameter] = {}
    swapper, was_empty = None, False
    for unit in (*sharding_units(model), model):
        for module in unit.modules():
            for key, param in module._parameters.items():
                if param is None or is_zero_param(param):
                    continue
                if not param.is_meta:
                    param.data = param.data.to(dtype)
                    continue
                if id(param) not in filled:
                    values = _initial(role, names[id(param)], tuple(param.shape), seed).to(device, dtype)
                    filled[id(param)] = nn.Parameter(values, requires_grad=param.requires_grad)
                module._parameters[key], was_empty = filled[id(param)], True
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[key] = torch.empty_like(buffer, device=device)
        with _quiet():
            init = deepspeed.zero.Init(module=unit, config_dict_or_path=dict(config), param_swapper=swapper)
        swapper = init.param_swapper
    if was_empty:
        reset_buffers(model)


def _initial(role: Role, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    assert role.initial is not None, "checked by the caller"
    return torch.from_numpy(role.initial(name, shape, seed))


def _shape(param: Any) -> tuple[int, ...]:
    """Of a whole parameter, which DeepSpeed may have emptied."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _import_muon() -> None:
    """ZeRO asks in its first step whether its optimizer is Muon, whose import would load torch's compiler: seconds."""
    compiled = compiler.compile
    compiler.compile = lambda *args, **options: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiled


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's remarks out of the rank's log; errors are exceptions."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _one_kind_of_optimizer() -> Iterator[None]:
    """Have ZeRO-1 in bf16 served by DeepSpeed's ZeRO optimizer too.

    DeepSpeed would take its BF16_Optimizer, which knows no loss scale and applies a non-finite gradient.
    """
    choose = deepspeed.DeepSpeedEngine._do_optimizer_sanity_check
    deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = lambda engine, optimizer: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = choose


@contextlib.contextmanager
def _no_shared_memory_operator() -> Iterator[None]:
    """Keep DeepSpeed from compiling an all-reduce through shared memory that only its inference uses."""
    deepspeed.ops.__dict__["__compatible_ops__"] = {}  # else found out, at length, when it is asked for
    try:
        yield
    finally:
        del deepspeed.ops.__dict__["__compatible_ops__"]


_import_muon()
