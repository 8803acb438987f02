"""What the torch strategies refuse, and what to use instead. Imports no framework, so that a launch can ask at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from unitrain import registry
from unitrain.errors import did_you_mean
from unitrain.importers.accelerate import (
    PRECISIONS,
    AccelerateConfig,
    deepspeed_config,
    import_deepspeed,
    read_accelerate,
)
from unitrain.importers.foreign import whole
from unitrain.recipe import Recipe, StrategyRecipe
from unitrain.strategy import Cluster, Problem
from unitrain.world import World

COMMON = ("activation_checkpointing", "compile")
# Keywords of torch.nn.parallel.DistributedDataParallel that a recipe can write down; a test compares them.
DDP = (
    "batched_grad_copy",
    "bucket_cap_mb",
    "bucket_cap_mb_list",
    "check_reduction",
    "find_unused_parameters",
    "forward_sync_buffers",
    "gradient_as_bucket_view",
    "init_sync",
    "skip_all_reduce_unused_params",
    "static_graph",
)
FSDP2 = ("cpu_offload", "param_dtype", "reduce_dtype", "reshard_after_forward", "shard_size")
DTYPES = ("fp32", "bf16", "fp16")
# What the DeepSpeed strategies take besides a DeepSpeed configuration.
ZERO_OWN = ("offload", "nvme_path")
# Keys of a DeepSpeed configuration that pass through.
DEEPSPEED = (
    "activation_checkpointing",
    "aio",
    "comet",
    "communication_data_type",
    "comms_logger",
    "compile",
    "csv_monitor",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "sparse_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
# Keys of a DeepSpeed configuration that the recipe says in its own words, for every strategy alike.
ZERO_RECIPE = {
    "train_batch_size": "set train.global_batch",
    "train_micro_batch_size_per_gpu": "set train.micro_batch",
    "gradient_accumulation_steps": "take it out: ranks accumulate as train.global_batch and micro_batch say",
    "managed_gradient_accumulation": "take it out: an update is one global batch",
    "gradient_clipping": "set optimizer.clip",
    "gradient_allreduce_op": "take it out: gradients are of the mean over the global batch",
    "optimizer": "set the keys of optimizer",
    "scheduler": "set the keys of schedule",
    "bf16": "set train.precision: bf16",
    "bfloat16": "set train.precision: bf16",
    "fp16": "set train.precision: fp16",
    "amp": "set train.precision",
    "torch_autocast": "set train.precision",
    "data_types": "set train.precision",
    "checkpoint": "set the keys of checkpoint",
    "load_universal_checkpoint": "take it out: checkpoints are unitrain's own",
    "use_node_local_storage": "set checkpoint.path",
    "datastates_ckpt": "set the keys of checkpoint",
    "dataloader_drop_last": "take it out: every row is trained on",
}
# Keys of a DeepSpeed configuration that want another program around them.
ZERO_ELSEWHERE = {
    "autotuning": "it starts runs of its own",
    "compression_training": "it rewrites the model",
    "curriculum_learning": "it changes the data",
    "data_efficiency": "it changes the data",
    "elasticity": "it changes the batch",
    "expert_parallel": "experts are not cut here",
    "hybrid_engine": "it is for inference between updates",
    "nebula": "checkpoints are unitrain's own",
    "pipeline": "layers are not cut into stages here",
    "sequence_parallel_size": "sequences are not cut here",
    "tensor_parallel": "matrices are not cut here",
    "weight_quantization": "it rewrites the model",
    "zenflow": "it delays updates",
}
ZERO_CHANGES = {
    "compute_grad_norm": "clipping and the finite check need the norm",
    "zenflow": "it delays updates",
    "elastic_checkpoint": "checkpoints are unitrain's own",
    "load_from_fp32_weights": "checkpoints are unitrain's own",
    "legacy_stage1": "DeepSpeed has dropped it",
    "cpu_offload": "use --strategy zero2_offload or zero3_offload",
    "cpu_offload_param": "use --strategy zero3_offload",
}
# Keys of DeepSpeed's zero_optimization; a test compares them.
ZERO_KEYS = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "cpu_offload_use_pin_memory",
    "enable_sanity_checks",
    "ignore_unused_parameters",
    "leaf_module",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "override_module_apply",
    "parameter_alignment",
    "pipeline_loading_checkpoint",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "save_muon_momentum_buffer_in_memory",
    "stage",
    "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)
# option -> what it may be, or the least number
HOROVOD: Mapping[str, tuple[str | bool, ...] | float] = MappingProxyType({
    "adasum": (True, False),
    "backend": ("gloo", "mpi"),
    "compression": ("none", "fp16"),
    "cycle_time_ms": 0.1,
    "fusion_threshold_mb": 0,
})  # fmt: skip
HOROVOD_MPI = "python -m unitrain.build horovod --mpi"


def single(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `single`."""
    found = list(_unknown_options(recipe, COMMON))
    if cluster.ranks > 1:
        found.append(
            Problem(
                f"strategy 'single' trains in one process, but {cluster.ranks} ranks were asked for",
                "use --nproc 1, or --strategy ddp or fsdp2",
            )
        )
    return found


def ddp(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `ddp`."""
    return list(_unknown_options(recipe, (*COMMON, *DDP)))


def fsdp2(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `fsdp2`."""
    found = list(_unknown_options(recipe, (*COMMON, *FSDP2)))
    options = recipe.strategy.options
    size = options.get("shard_size")
    if size is not None and (not isinstance(size, int) or size < 1 or cluster.ranks % size):
        found.append(
            Problem(
                f"strategy.options.shard_size is {size!r}, which does not divide {cluster.ranks} ranks into groups",
                "use a divisor of the number of ranks, or leave it out to shard over all of them",
            )
        )
    for name in ("param_dtype", "reduce_dtype"):
        if options.get(name) not in (None, *DTYPES):
            found.append(Problem(f"strategy.options.{name} is {options[name]!r}", f"use one of {', '.join(DTYPES)}"))
    return found


def zero1(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `zero1`."""
    return _zero(recipe, stage=1)


def zero2(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `zero2`."""
    return _zero(recipe, stage=2)


def zero3(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `zero3`."""
    return _zero(recipe, stage=3)


def zero2_offload(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `zero2_offload`."""
    return _zero(recipe, stage=2, offloads=("offload_optimizer",))


def zero3_offload(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `zero3_offload`."""
    return _zero(recipe, stage=3, offloads=("offload_optimizer", "offload_param"))


def _zero(recipe: Recipe, *, stage: int, offloads: tuple[str, ...] = ()) -> list[Problem]:
    """Problems of a DeepSpeed strategy, whose options are a DeepSpeed configuration."""
    options, name = recipe.strategy.options, recipe.strategy.name
    found = []
    for key in options:
        if key in ZERO_RECIPE:
            found.append(Problem(f"strategy.options.{key} would contradict the recipe", ZERO_RECIPE[key]))
        elif key in ZERO_ELSEWHERE:
            found.append(Problem(f"strategy {name!r} does not take {key!r}: {ZERO_ELSEWHERE[key]}", "take it out"))
    known = (*COMMON, *(ZERO_OWN if offloads else ()), *DEEPSPEED)
    found += _unknown_options(recipe, (*known, *ZERO_RECIPE, *ZERO_ELSEWHERE), shown=known)
    zero = options.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        return [
            *found,
            Problem(f"strategy.options.zero_optimization is {zero!r}", "give a mapping of DeepSpeed's keys"),
        ]
    where = "strategy.options.zero_optimization"
    if zero.get("stage", stage) != stage:
        instead = f"use --strategy zero{zero['stage']}" if zero["stage"] in (1, 2, 3) else "use --strategy ddp"
        found.append(Problem(f"{where}.stage is {zero['stage']!r}, and strategy {name!r} is stage {stage}", instead))
    for part in ("offload_optimizer", "offload_param"):
        if part in zero and part not in offloads:
            better = "zero2_offload or zero3_offload" if part == "offload_optimizer" else "zero3_offload"
            found.append(Problem(f"strategy {name!r} offloads nothing to {where}.{part}", f"use --strategy {better}"))
        device = zero.get(part, {}).get("device", options.get("offload", "cpu")) if part in offloads else None
        if device not in (None, options.get("offload", "cpu")):
            found.append(Problem(f"{where}.{part}.device is {device!r}", "set strategy.options.offload to it instead"))
    for key in zero:
        if key in ZERO_CHANGES:
            found.append(Problem(f"{where}.{key} would change what an update is: {ZERO_CHANGES[key]}", "take it out"))
        elif key not in ZERO_KEYS:
            what = f"{where} has no key {key!r}{did_you_mean(key, ZERO_KEYS)}"
            found.append(Problem(what, f"known: {', '.join(ZERO_KEYS)}"))
    if stage == 1 and zero.get("overlap_comm"):
        found.append(Problem(f"{where}.overlap_comm needs gradients reduced as they come", "use --strategy zero2"))
    return [*found, *_zero_offload(recipe, stage, offloads)]


def _zero_offload(recipe: Recipe, stage: int, offloads: tuple[str, ...]) -> Iterator[Problem]:
    options, name = recipe.strategy.options, recipe.strategy.name
    if not offloads:
        return
    if recipe.optimizer.name != "adamw":
        what = f"strategy {name!r} moves parameters by DeepSpeedCPUAdam, which has no {recipe.optimizer.name!r}"
        yield Problem(what, f"use optimizer.name: adamw, or --strategy zero{stage}")
    device = options.get("offload", "cpu")
    if device not in ("cpu", "nvme"):
        yield Problem(f"strategy.options.offload is {device!r}", "use cpu or nvme")
    if device == "nvme" and stage < 3:
        yield Problem(f"strategy {name!r} offloads to host memory only", "use --strategy zero3_offload for NVMe")
    if device == "nvme" and not isinstance(options.get("nvme_path"), str):
        yield Problem("strategy.options.offload is 'nvme', but nvme_path is not given", "name a folder on the drive")
    if device != "nvme" and "nvme_path" in options:
        yield Problem("strategy.options.nvme_path would have no effect", "set strategy.options.offload to nvme")


def accelerate(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `accelerate`, whose option is an accelerate configuration file."""
    found = list(_unknown_options(recipe, (*COMMON, "config")))
    path = recipe.strategy.options.get("config")
    if path is None:
        return found
    if not isinstance(path, str):
        return [*found, Problem(f"strategy.options.config is {path!r}", "give the path of an accelerate config file")]
    config = read_accelerate(path)
    if config.kind not in ("alone", "ddp", "fsdp", "deepspeed"):
        what = f"{path} has distributed_type: {config.distributed_type}"
        return [*found, Problem(what, "use MULTI_CPU, MULTI_GPU, FSDP or DEEPSPEED there, or another strategy")]
    found += _accelerate_ranks(path, config, cluster)
    found += _accelerate_recipe(path, config, recipe)
    others = dict(config.others)
    if config.kind == "fsdp" and config.fsdp is not None:
        if config.fsdp.version == 1:
            what = f"{path} asks for FSDP 1, which flattens the parameters that checkpoints name"
            instead = "set fsdp_version: 2 (`accelerate to-fsdp2` rewrites a file), or use --strategy fsdp2"
            found.append(Problem(what, instead))
        others.update({f"fsdp_config.{key}": value for key, value in config.fsdp.others.items()})
    if config.kind == "deepspeed":
        found += _accelerate_deepspeed(path, config, recipe)
        others.update(import_deepspeed(config).unknown)
    return found + [
        Problem(f"{path} has {key}: {value}, which would have no effect", f"take {key} out of the file")
        for key, value in others.items()
    ]


def _accelerate_ranks(path: str, config: AccelerateConfig, cluster: Cluster) -> Iterator[Problem]:
    for key, said, here, ours in (
        ("num_processes", config.num_processes, cluster.ranks, "launcher.nproc"),
        ("num_machines", config.num_machines, cluster.nodes, "launcher.nodes"),
    ):
        if said not in (None, here):
            what = f"{path} has {key}: {said}, and the recipe starts {here}"
            yield Problem(what, f"set {ours}, or take {key} out of the file")
    if config.kind == "alone" and cluster.ranks > 1:
        what = f"{path} has distributed_type: NO, which is one process, and the recipe starts {cluster.ranks}"
        yield Problem(what, "use --nproc 1, or set distributed_type: MULTI_GPU or MULTI_CPU")


def _accelerate_recipe(path: str, config: AccelerateConfig, recipe: Recipe) -> Iterator[Problem]:
    """What the file would have accelerate do and the recipe says in its own words."""
    word, ours = config.mixed_precision, recipe.train.precision
    precision = PRECISIONS.get(word or "")
    if word is not None and precision != ours and not (config.kind == "deepspeed" and word == "no"):
        instead = f"set train.precision={precision}" if precision else f"use one of {', '.join(DTYPES)}"
        yield Problem(f"{path} has mixed_precision: {word}, and train.precision is {ours}", instead)
    if config.accumulation not in (None, 1):
        yield _accumulates(f"{path} has gradient_accumulation_steps: {config.accumulation}")
    if config.compiler is not None:
        what = f"{path} has dynamo_config.dynamo_backend: {config.compiler}"
        yield Problem(what, "take it out, and set strategy.options.compile=true to compile the model's blocks")


def _accumulates(what: str) -> Problem:
    return Problem(what, "take it out: train.global_batch and train.micro_batch say how often ranks accumulate")


def _accelerate_deepspeed(path: str, config: AccelerateConfig, recipe: Recipe) -> Iterator[Problem]:
    """What of the DeepSpeed configuration differs from the recipe, and what its stage refuses."""
    values, where, _ = deepspeed_config(config)
    steps = values.get("gradient_accumulation_steps")
    if steps not in (None, 1, "auto"):
        yield _accumulates(f"{where} has gradient_accumulation_steps: {steps}")
    implied = import_deepspeed(config).recipe
    for group in ("optimizer", "schedule", "train"):
        for key, wanted in implied.get(group, {}).items():
            if (group, key) == ("train", "precision") and config.mixed_precision not in (None, "no"):
                continue  # the word of accelerate's file, compared above
            ours = getattr(getattr(recipe, group), key)
            if (list(ours) if isinstance(ours, tuple) else ours) != wanted:
                what = f"{where} asks for {group}.{key}={wanted}, and the recipe has {ours}"
                yield Problem(what, f"set {group}.{key}={wanted}, or take it out of the file")
    stage = accelerate_stage(recipe, config)
    if whole(values["zero_optimization"].get("stage")) == 1 and stage.offloads:
        yield Problem(f"{where} has ZeRO stage 1 with an offloaded optimizer", "set the stage to 2")
    if stage.number == 0:
        yield Problem(f"{where} has ZeRO stage 0", "set distributed_type: MULTI_GPU or MULTI_CPU")
    else:
        yield from _zero(stage.recipe, stage=stage.number, offloads=stage.offloads)


class Stage(NamedTuple):
    """What an accelerate file asks of DeepSpeed: ZeRO's stage, its offloads, and the options of zero1, zero2, ..."""

    number: int
    offloads: tuple[str, ...]
    recipe: Recipe


def accelerate_stage(recipe: Recipe, config: AccelerateConfig) -> Stage:
    """The file's ZeRO stage, with the recipe's own common options. Raises RecipeError."""
    strategy = import_deepspeed(config).recipe["strategy"]
    name, options = strategy["name"], strategy.get("options", {})
    asked, _, _ = deepspeed_config(config)
    zero = asked.get("zero_optimization", {})
    parts = [part for part in ("offload_optimizer", "offload_param") if part in zero]
    offloads = tuple(part for part in parts if zero[part].get("device") in ("cpu", "nvme"))
    common = {key: value for key, value in recipe.strategy.options.items() if key in COMMON}
    number = int(name[4]) if name.startswith("zero") else 0
    return Stage(number, offloads, recipe.replace(strategy=StrategyRecipe(name=name, options={**common, **options})))


def horovod(recipe: Recipe, cluster: Cluster) -> list[Problem]:
    """Problems of strategy `horovod`."""
    found = list(_unknown_options(recipe, (*COMMON, *HOROVOD)))
    options = recipe.strategy.options
    for name, known in HOROVOD.items():
        value = options.get(name)
        if isinstance(known, tuple):
            if value is not None and value not in known:
                what = f"strategy.options.{name} is {value!r}"
                found.append(Problem(what, f"use one of {', '.join(str(each).lower() for each in known)}"))
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < known):
            found.append(Problem(f"strategy.options.{name} is {value!r}", f"use a number, {known} or more"))
    adasum, mpi = bool(options.get("adasum")), options.get("backend") == "mpi"
    if adasum and not mpi:
        found.append(Problem("Horovod has Adasum over MPI only", f"set strategy.options.backend=mpi ({HOROVOD_MPI})"))
    if adasum and cluster.ranks & (cluster.ranks - 1):
        what = f"Adasum combines ranks in pairs, and {cluster.ranks} is no power of two"
        found.append(Problem(what, "use 2, 4, 8, ... ranks, or leave strategy.options.adasum out"))
    if mpi and not horovod_has_mpi():
        found.append(
            Problem("this Horovod was built without MPI", f"{HOROVOD_MPI}, or leave strategy.options.backend out")
        )
    elif mpi and cluster.ranks > 1 and not _under_mpi(recipe):
        what = "with strategy.options.backend=mpi only MPI can start the ranks"
        found.append(Problem(what, "use --launcher mpi, or leave strategy.options.backend out"))
    if options.get("compression") == "fp16" and recipe.train.precision == "fp16":
        what = "strategy.options.compression=fp16 would overflow with the loss scale of train.precision=fp16"
        found.append(Problem(what, "use train.precision=bf16, or leave compression out"))
    return found


def horovod_has_mpi() -> bool:
    """What the installed library calls, as the library's file tells: importing it would import torch."""
    package = importlib.util.find_spec("horovod")
    libraries = [] if package is None else Path(str(package.origin)).parent.glob("torch/mpi_lib*.so")
    return any(b"MPI_Init_thread" in library.read_bytes() for library in libraries)


def _unknown_options(recipe: Recipe, known: Collection[str], shown: Collection[str] = ()) -> Iterator[Problem]:
    for name in recipe.strategy.options:
        if name not in known:
            what = f"strategy {recipe.strategy.name!r} has no option {name!r}{did_you_mean(name, known)}"
            yield Problem(what, f"known: {', '.join(sorted(shown or known))}")


def _under_mpi(recipe: Recipe) -> bool:
    """True where mpirun starts the ranks, or has started this one."""
    starters = registry.known("launchers", recipe.launcher.name).starter, World.from_environment().starter
    return "mpirun" in starters or starters[1] == "srun"
