"""What a DeepSpeed configuration (`ds_config.json`) asks for, read as data, as a recipe that asks for the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .foreign import Imported, group, is_set, number, read_file, truth, whole

AUTO = "auto"  # what transformers' Trainer fills in
ADAM = ("adam", "adamw", "fusedadam", "cpuadam")
# what the strategies zero1, zero2, ... take from a DeepSpeed configuration as it stands
PASSED_ON = (
    *("aio", "activation_checkpointing", "communication_data_type", "disable_allgather", "gradient_predivide_factor"),
    *("prescale_gradients", "sparse_gradients"),
)
# what DeepSpeed says and shows of a run, which changes nothing in it
REPORTING = (
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "tensorboard", "wandb"),
    *("csv_monitor", "comet", "comms_logger", "flops_profiler"),
)
# said for optimizers, devices and checkpoints that are the strategy's own here
WITHOUT_EFFECT = (
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "stage3_gather_16bit_weights_on_model_save"),
    *("stage3_gather_fp16_weights_on_model_save", "checkpoint", "elastic_checkpoint"),
)


def looks_like_deepspeed(values: Mapping[str, Any]) -> bool:
    """True for a mapping that holds what only DeepSpeed's configurations hold."""
    return not {"zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu"}.isdisjoint(values)


def read_ds_config(path: str | Path) -> Imported:
    """The recipe that asks for what a file asks for, as far as it is understood. Raises RecipeError."""
    return import_ds_config(read_file(path), str(path))


def import_ds_config(values: Mapping[str, Any], where: str, *, ranks: int | None = None) -> Imported:
    """The same, of a mapping; `ranks` is the number of processes, where it is known. Raises RecipeError."""
    left, out = dict(values), Imported()
    automatic = sorted(_without_auto(left, ""))
    _put_batch(out, left, ranks)
    _put_precision(out, left, where)
    clip = left.pop("gradient_clipping", None)
    if is_set(clip) and (found := number(clip)) is not None and found >= 0:
        out.put("optimizer.clip", found or None)
    elif is_set(clip):
        out.leave({"gradient_clipping": clip})
    _put_optimizer(out, group(left, "optimizer", where), where)
    _put_schedule(out, group(left, "scheduler", where), where)
    _put_zero(out, left, where)
    if silent := [key for key in REPORTING if is_set(left.pop(key, None))]:
        out.notes.append(f"what DeepSpeed would print and track is left out: {', '.join(silent)}")
    for key in WITHOUT_EFFECT:
        left.pop(key, None)
    if automatic:
        out.notes.append(f"'auto' becomes the recipe's own default: {', '.join(automatic)}")
    out.leave({key: value for key, value in left.items() if is_set(value) and value not in ({}, [])})
    return out


def _put_batch(out: Imported, left: dict[str, Any], ranks: int | None) -> None:
    total, micro = whole(left.pop("train_batch_size", None)), whole(left.pop("train_micro_batch_size_per_gpu", None))
    steps = whole(left.pop("gradient_accumulation_steps", None))
    if micro:
        out.put("train.micro_batch", micro)
    if total:
        out.put("train.global_batch", total)
    elif micro and ranks:
        out.put("train.global_batch", micro * (steps or 1) * ranks)
    elif micro or (steps or 1) > 1:
        found = f"{micro or 'rows of one rank'} x {steps or 1}"
        out.notes.append(f"train.global_batch counts all ranks: {found} x the number of ranks; set it")


def _put_precision(out: Imported, left: dict[str, Any], where: str) -> None:
    enabled, said = [], False
    for key in ("bf16", "bfloat16", "fp16"):
        inner = group(left, key, where)
        said = said or "enabled" in inner
        if truth(inner.pop("enabled", False)):
            enabled.append("fp16" if key == "fp16" else "bf16")
            out.leave({name: value for name, value in inner.items() if is_set(value) and value != 0}, key)
    if len(set(enabled)) > 1:
        raise RecipeError(f"{where}: both bf16 and fp16 are enabled; enable one of them")
    if said:
        out.put("train.precision", enabled[0] if enabled else "fp32")


def _put_optimizer(out: Imported, values: dict[str, Any], where: str) -> None:
    if not values:
        return
    kind, params = str(values.pop("type", "")), group(values, "params", where)
    name = "adamw" if kind.lower() in ADAM else "sgd" if kind.lower() == "sgd" else None
    if name is None:
        out.leave({"type": kind, "params": params, **values}, "optimizer")
        return
    out.put("optimizer.name", name)
    if name == "adamw":
        params.pop("torch_adam", None)
        # DeepSpeed's Adam is AdamW unless told otherwise.
        if truth(params.pop("adam_w_mode", True)) is False and number(params.get("weight_decay", 0)):
            out.notes.append("adam_w_mode: false adds weight decay to the gradient; the recipe's adamw decouples it")
        betas = params.pop("betas", None)
        if isinstance(betas, list) and len(betas) == 2 and None not in (pair := [number(beta) for beta in betas]):
            out.put("optimizer.betas", pair)
        elif betas is not None:
            out.leave({"betas": betas}, "optimizer.params")
    for key in ("lr", "eps", "weight_decay") if name == "adamw" else ("lr", "momentum", "weight_decay"):
        found = params.pop(key, None)
        if number(found) is not None:
            out.put(f"optimizer.{key}", number(found))
        elif found is not None:
            out.leave({key: found}, "optimizer.params")
    out.leave({key: value for key, value in params.items() if is_set(value)}, "optimizer.params")
    out.leave({key: value for key, value in values.items() if is_set(value)}, "optimizer")


def _put_schedule(out: Imported, values: dict[str, Any], where: str) -> None:
    if not values:
        return
    kind, params = str(values.pop("type", "")), group(values, "params", where)
    names = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
    if kind not in names:
        out.leave({"type": kind, "params": params, **values}, "scheduler")
        return
    out.put("schedule.name", names[kind])
    for key, place in (("warmup_num_steps", "schedule.warmup_steps"), ("total_num_steps", "train.steps")):
        found = params.pop(key, None)
        if whole(found) is not None:
            out.put(place, whole(found))
        elif found is not None:
            out.leave({key: found}, "scheduler.params")
    if (top := number(params.pop("warmup_max_lr", None))) is not None:
        out.put("optimizer.lr", top)
    if kind == "WarmupCosineLR":
        out.put("schedule.final", number(params.pop("cos_min_ratio", 0.0001)))
        kind_of_rise = params.pop("warmup_type", "linear")
    else:
        kind_of_rise = params.pop("warmup_type", "log")
    if kind_of_rise != "linear":
        out.notes.append(f"{kind} warms up by the logarithm of the step; the recipe's warm-up is linear")
    out.leave({key: value for key, value in params.items() if is_set(value) and value != 0}, "scheduler.params")


def _put_zero(out: Imported, left: dict[str, Any], where: str) -> None:
    """The strategy: the ZeRO stage, where the state lies, and what DeepSpeed is told besides."""
    zero = group(left, "zero_optimization", where)
    stage = whole(zero.pop("stage", 0))
    if stage not in (0, 1, 2, 3):
        raise RecipeError(f"{where}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    for key in WITHOUT_EFFECT:
        zero.pop(key, None)
    if stage == 0:
        out.put("strategy.name", "ddp")
        out.leave({key: value for key, value in zero.items() if is_set(value)}, "zero_optimization")
        return
    offloads = _offloads(out, zero, where)
    if stage == 1 and is_set(zero.pop("overlap_comm", None)):
        out.notes.append("overlap_comm is left out: with ZeRO-1 gradients are not reduced as they come")
    if stage == 1 and offloads:
        out.notes.append("ZeRO-1 with an offloaded optimizer becomes zero2_offload")
        stage = 2
    if stage == 3 and set(offloads) == {"offload_optimizer"}:
        out.notes.append("zero3_offload moves the parameters to host memory too, and not the optimizer alone")
    out.put("strategy.name", f"zero{stage}_offload" if offloads else f"zero{stage}")
    own = {part: tuned for part, tuned in offloads.items() if tuned}
    if zero or own:
        out.put("strategy.options.zero_optimization", zero | own)
    for key in PASSED_ON:
        if is_set(value := left.pop(key, None)):
            out.put(f"strategy.options.{key}", value)


def _offloads(out: Imported, zero: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """offload_optimizer and offload_param, where they are asked for, with what tunes them."""
    found: dict[str, dict[str, Any]] = {}
    old = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_params"}  # before DeepSpeed 0.5
    for part, old_name in old.items():
        offload = group(zero, part, where)
        device = offload.pop("device", "cpu" if truth(zero.pop(old_name, None)) else None)
        path = offload.pop("nvme_path", None)
        if device in ("cpu", "nvme"):
            found[part] = {key: value for key, value in offload.items() if value is not None}
            if device == "nvme":
                out.put("strategy.options.offload", "nvme")
                out.put("strategy.options.nvme_path", path)
        elif is_set(device):
            out.leave({"device": device}, f"zero_optimization.{part}")
    return found


def _without_auto(values: dict[str, Any], prefix: str) -> list[str]:
    """Take what is 'auto' out of nested groups, which are copied; the dotted keys."""
    found: list[str] = []
    for key, value in list(values.items()):
        if value == AUTO:
            found.append(prefix + key)
            del values[key]
        elif isinstance(value, dict):
            values[key] = dict(value)
            found += _without_auto(values[key], f"{prefix}{key}.")
        elif isinstance(value, list) and AUTO in value:
            found.append(prefix + key)
            del values[key]
    return found
