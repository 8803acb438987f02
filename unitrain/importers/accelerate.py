"""What an accelerate configuration file asks for, read as data, and the recipe that asks for the same.

The keys are those that `accelerate config` of accelerate 1.15 writes. Nothing of accelerate is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .ds_config import import_ds_config
from .foreign import Imported, group, is_set, read_file, truth, whole

PRECISIONS = {"no": "fp32", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
REPLICAS = ("MULTI_CPU", "MULTI_GPU")
# how `accelerate launch` starts and joins processes, which is the launcher's part here
STARTING = (
    *("debug", "machine_rank", "main_process_ip", "main_process_port", "rdzv_backend", "same_network"),
    *("main_training_function", "mpirun_config", "command_file", "commands"),
)
# sharding strategies of FSDP 1, also by the numbers that older files hold
SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
WRAPS = ("NO_WRAP", "TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP")
# of FSDP: what checkpoints look like, how pretrained weights are read, and prefetching, which change no result
FSDP_WITHOUT_EFFECT = (
    *("state_dict_type", "cpu_ram_efficient_loading", "sync_module_states", "use_orig_params"),
    *("backward_prefetch", "backward_prefetch_policy", "forward_prefetch"),
)
DEEPSPEED_STARTING = (
    *("deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter"),
    *("deepspeed_multinode_launcher", "zero3_init_flag", "zero3_save_16bit_model"),
)


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    """The group `fsdp_config`, its names without `fsdp_`."""

    version: int = 1
    reshard_after_forward: bool = True
    sharding: str = "FULL_SHARD"  # of FSDP 1
    offload: bool = False
    wrap: str = "NO_WRAP"
    layer_classes: tuple[str, ...] = ()  # of TRANSFORMER_BASED_WRAP
    min_num_params: int = 0  # of SIZE_BASED_WRAP
    activation_checkpointing: bool = False
    others: Mapping[str, Any] = field(default_factory=dict)  # not understood


@dataclass(frozen=True, kw_only=True)
class AccelerateConfig:
    """An accelerate configuration file. None: the file says nothing of it."""

    file: str = ""
    distributed_type: str | None = None
    use_cpu: bool | None = None
    mixed_precision: str | None = None  # no, fp16, bf16, fp8
    num_processes: int | None = None  # over all machines
    num_machines: int | None = None
    accumulation: int | None = None
    compiler: str | None = None  # a backend of torch.compile
    fsdp: FSDPConfig | None = None
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  # as it stands
    starting: tuple[str, ...] = ()  # keys that only `accelerate launch` obeys
    others: Mapping[str, Any] = field(default_factory=dict)  # dotted key -> value: not understood

    @property
    def kind(self) -> str:
        """ddp, fsdp, deepspeed, alone; else the file's own word."""
        kind = self.distributed_type
        if kind is None:
            # as `accelerate launch` takes it: whichever group is there
            return "fsdp" if self.fsdp else "deepspeed" if self.deepspeed else "ddp"
        return {"NO": "alone", "FSDP": "fsdp", "DEEPSPEED": "deepspeed", **dict.fromkeys(REPLICAS, "ddp")}.get(
            kind, kind
        )


def looks_like_accelerate(values: Mapping[str, Any]) -> bool:
    """True for a mapping that holds what only accelerate's files hold."""
    return "distributed_type" in values or "compute_environment" in values


def read_accelerate(path: str | Path) -> AccelerateConfig:
    """The configuration in a YAML or JSON file. Raises RecipeError where it cannot be one."""
    return accelerate_config(read_file(path), str(path))


def accelerate_config(values: Mapping[str, Any], where: str) -> AccelerateConfig:
    """The same, of a mapping. Raises RecipeError naming the key."""
    left = dict(values)
    others: dict[str, Any] = {}
    starting = tuple(key for key in STARTING if is_set(left.pop(key, None)))
    for key, plain in (("compute_environment", "LOCAL_MACHINE"), ("gpu_ids", "all")):
        if is_set(found := left.pop(key, None)) and found != plain:
            others[key] = found
    kind = left.pop("distributed_type", None)
    fsdp, dynamo = group(left, "fsdp_config", where), group(left, "dynamo_config", where)
    dynamo.setdefault("dynamo_backend", left.pop("dynamo_backend", None))
    compiler = dynamo.pop("dynamo_backend")
    for key, value in dynamo.items():
        if is_set(value) and is_set(compiler) and (key, value) != ("dynamo_mode", "default"):
            others[f"dynamo_config.{key}"] = value
    precision = left.pop("mixed_precision", None)
    return AccelerateConfig(
        file=where,
        distributed_type="NO" if kind is False else _word("distributed_type", kind, where),
        use_cpu=_truth("use_cpu", left.pop("use_cpu", None), where),
        mixed_precision="no" if precision is False else _word("mixed_precision", precision, where),
        num_processes=_count("num_processes", left.pop("num_processes", None), where),
        num_machines=_count("num_machines", left.pop("num_machines", None), where),
        accumulation=_count("gradient_accumulation_steps", left.pop("gradient_accumulation_steps", None), where),
        compiler=_word("dynamo_backend", compiler, where) if is_set(compiler) else None,
        deepspeed=group(left, "deepspeed_config", where),
        fsdp=_fsdp(fsdp, where) if fsdp else None,
        starting=starting,
        others={**others, **{key: value for key, value in left.items() if is_set(value) and value not in ({}, [])}},
    )


def import_accelerate(path: str | Path) -> Imported:
    """The recipe that asks for what the file asks for, as far as it is understood. Raises RecipeError."""
    config = read_accelerate(path)
    out = Imported()
    _put_ranks(out, config)
    _put_strategy(out, config)
    if config.mixed_precision is not None:
        precision = PRECISIONS.get(config.mixed_precision)
        if precision is None:
            out.leave({"mixed_precision": config.mixed_precision})
        elif precision != "fp32" or config.kind != "deepspeed":  # DeepSpeed's own file has the last word
            out.put("train.precision", precision)
    if config.accumulation not in (None, 1):
        out.notes.append(_accumulated(config.accumulation))
    if config.compiler is not None:
        if config.compiler.lower() == "inductor":
            out.put("strategy.options.compile", True)
        else:
            out.leave({"dynamo_config.dynamo_backend": config.compiler})
    if config.use_cpu and config.kind != "alone":
        out.notes.append("use_cpu: a rank takes a GPU where it sees one; hide them all (CUDA_VISIBLE_DEVICES=)")
    if config.starting:
        out.notes.append(f"how processes meet is the launcher's part, left out: {', '.join(config.starting)}")
    out.leave(config.others)
    return out


def _put_ranks(out: Imported, config: AccelerateConfig) -> None:
    """`num_processes` counts all machines, `launcher.nproc` one."""
    nodes, total = config.num_machines or 1, config.num_processes
    if nodes > 1:
        out.put("launcher.nodes", nodes)
    if total is None:
        return
    if total % nodes:
        out.leave({"num_processes": total})
        out.notes.append(f"num_processes is {total}, which {nodes} machines cannot share evenly; set launcher.nproc")
    else:
        out.put("launcher.nproc", total // nodes)


def _put_strategy(out: Imported, config: AccelerateConfig) -> None:
    match config.kind:
        case "alone":
            out.put("strategy.name", "ddp" if (config.num_processes or 1) > 1 else "single")
        case "ddp":
            out.put("strategy.name", "ddp")
        case "fsdp":
            _put_fsdp(out, config, config.fsdp or FSDPConfig())
        case "deepspeed":
            _put_deepspeed(out, config)
        case other:
            out.leave({"distributed_type": other})
            out.notes.append(
                f"no strategy does what {other} does, so strategy.name is left at its default; see what there is by "
                "`unitrain list strategies`"
            )
    if config.kind != "fsdp" and config.fsdp is not None:
        out.notes.append(f"fsdp_config has no effect with distributed_type {config.distributed_type}; left out")


def _put_fsdp(out: Imported, config: AccelerateConfig, fsdp: FSDPConfig) -> None:
    options: dict[str, Any] = {}
    reshard = fsdp.reshard_after_forward
    if fsdp.version == 1:
        out.notes.append("FSDP 1 becomes fsdp2, which cuts each parameter by rows and flattens none")
        if fsdp.sharding == "NO_SHARD":
            out.put("strategy.name", "ddp")
            return
        reshard = fsdp.sharding not in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2")
        if fsdp.sharding.startswith("HYBRID"):
            ranks = config.num_processes or 1
            if ranks % (config.num_machines or 1) == 0:
                options["shard_size"] = ranks // (config.num_machines or 1)
    if not reshard:
        options["reshard_after_forward"] = False
    if fsdp.offload:
        options["cpu_offload"] = True
    if fsdp.activation_checkpointing:
        options["activation_checkpointing"] = True
    out.put("strategy.name", "fsdp2")
    if options:
        out.put("strategy.options", options)
    if fsdp.wrap != "NO_WRAP":
        what = {"TRANSFORMER_BASED_WRAP": ", ".join(fsdp.layer_classes) or "the model's own blocks"}
        units = what.get(fsdp.wrap, f"modules of {fsdp.min_num_params} parameters and more")
        out.notes.append(
            f"the model says what is sharded as one unit ({units} in the file): by its sharding_units(), else the "
            "members of its module lists"
        )
    out.leave(fsdp.others, "fsdp_config")


def _put_deepspeed(out: Imported, config: AccelerateConfig) -> None:
    inner = import_deepspeed(config)
    for name, part in inner.recipe.items():
        for key, value in part.items():
            out.put(f"{name}.{key}", value)
    out.notes += inner.notes
    out.leave(inner.unknown)


def import_deepspeed(config: AccelerateConfig) -> Imported:
    """The recipe for the group `deepspeed_config`, or for the file that it names. Raises RecipeError."""
    found, where, left = deepspeed_config(config)
    inner = import_ds_config(found, where, ranks=config.num_processes)
    prefix = "deepspeed_config" if where == config.file else Path(where).name
    inner.unknown = {f"{prefix}.{key}": value for key, value in inner.unknown.items()}
    inner.leave(left, "deepspeed_config")
    return inner


def deepspeed_config(config: AccelerateConfig) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The DeepSpeed configuration, the file that holds it, and what of accelerate's group is not understood.

    Raises RecipeError where the file cannot be read.
    """
    values = {key: value for key, value in config.deepspeed.items() if key not in DEEPSPEED_STARTING}
    if is_set(file := values.pop("deepspeed_config_file", None)):
        beside = Path(config.file).parent / str(file)
        path = beside if beside.is_file() else Path(str(file))
        return read_file(path), str(path), {key: value for key, value in values.items() if is_set(value)}
    zero: dict[str, Any] = {"stage": values.pop("zero_stage", 2)}
    for part in ("optimizer", "param"):
        device, folder = values.pop(f"offload_{part}_device", None), values.pop(f"offload_{part}_nvme_path", None)
        if is_set(device):
            zero[f"offload_{part}"] = {"device": device} | ({"nvme_path": folder} if is_set(folder) else {})
    found: dict[str, Any] = {"zero_optimization": zero}
    for key in ("gradient_clipping", "gradient_accumulation_steps"):
        if is_set(value := values.pop(key, None)):
            found[key] = value
    return found, config.file, {key: value for key, value in values.items() if is_set(value)}


def _fsdp(values: Mapping[str, Any], where: str) -> FSDPConfig:
    left = {key.removeprefix("fsdp_"): value for key, value in values.items()}
    version = _count("fsdp_config.fsdp_version", left.pop("version", None), where) or 1
    if version not in (1, 2):
        raise RecipeError(f"{where}: fsdp_config.fsdp_version is {version}; it must be 1 or 2")
    reshard, sharding = left.pop("reshard_after_forward", None), left.pop("sharding_strategy", None)
    if version == 1:
        sharding, reshard = (
            _choice("sharding_strategy", reshard if sharding is None else sharding, SHARDING, where),
            True,
        )
    else:
        sharding, reshard = SHARDING[0], _truth("fsdp_config.fsdp_reshard_after_forward", reshard, where)
    classes = left.pop("transformer_layer_cls_to_wrap", None) or ()
    classes = classes.split(",") if isinstance(classes, str) else classes
    for key in FSDP_WITHOUT_EFFECT:
        left.pop(key, None)
    return FSDPConfig(
        version=version,
        sharding=sharding,
        reshard_after_forward=reshard is not False,
        offload=bool(_truth("fsdp_config.fsdp_offload_params", left.pop("offload_params", None), where)),
        wrap=_choice("auto_wrap_policy", left.pop("auto_wrap_policy", None), WRAPS, where),
        layer_classes=tuple(
            str(name).strip() for name in (classes.split(",") if isinstance(classes, str) else classes)
        ),
        min_num_params=whole(left.pop("min_num_params", None)) or 0,
        activation_checkpointing=bool(
            _truth("fsdp_config.fsdp_activation_checkpointing", left.pop("activation_checkpointing", None), where)
        ),
        others={f"fsdp_{key}": value for key, value in left.items() if is_set(value)},
    )


def _choice(key: str, value: Any, known: tuple[str, ...], where: str) -> str:
    """One of the known words, by name in any case or by its number from 1; the first where there is none."""
    if value is None:
        return known[0]
    place = whole(value)
    if place is not None and 1 <= place <= len(known):
        return known[place - 1]
    if str(value).upper() in known:
        return str(value).upper()
    raise RecipeError(f"{where}: fsdp_config.fsdp_{key} is {value!r}; it must be one of {', '.join(known)}")


def _word(key: str, value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise RecipeError(f"{where}: {key} is {value!r}; it must be a word")


def _truth(key: str, value: Any, where: str) -> bool | None:
    if value is not None and truth(value) is None:
        raise RecipeError(f"{where}: {key} is {value!r}; it must be true or false")
    return truth(value)


def _count(key: str, value: Any, where: str) -> int | None:
    """A whole number of at least 1; -1, `auto` and nothing at all are none."""
    if value is None or value in (-1, "auto"):
        return None
    found = whole(value)
    if found is None or found < 1:
        raise RecipeError(f"{where}: {key} is {value!r}; it must be a whole number of at least 1")
    return found


def _accumulated(steps: int | None) -> str:
    return (
        f"gradient_accumulation_steps {steps}: train.global_batch counts all samples of a step; with rows-per-rank b, "
        f"say train.global_batch = ranks x b x {steps} and train.micro_batch = b"
    )
