"""Weights out of DeepSpeed's pickled files, in a process that does nothing else: `python -m ... TASK`.

Files are read with `weights_only=True`: of all that a pickle can name, tensors, containers and the few harmless
classes below are made, each as an empty stand-in, and any other name ends the import. Nothing of DeepSpeed is imported.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


class Inert:
    """Stands for an object of DeepSpeed that holds no weights."""


STAND_INS: dict[str, Any] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Inert,
    "deepspeed.utils.tensor_fragment.fragment_address": Inert,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
}


def main(text: str) -> None:
    """Do one task and print its facts as JSON."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no copy of somebody's weights
    task = json.loads(text)
    tensors, facts = gather([load(path) for path in task["models"]], [load(path) for path in task["partitions"]])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, task["out"], metadata={"format": "pt"})
    elements = sum(tensor.numel() for tensor in tensors.values())
    print(json.dumps({**facts, "tensors": len(tensors), "elements": elements}))


def load(path: str) -> dict[str, Any]:
    """The mapping in a file of torch.save, tensors on the host and read when they are used."""
    with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"{Path(path).name} holds a {type(found).__name__}, not a mapping")
    return found


def gather(models: list[dict[str, Any]], partitions: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(whole tensors by name, what is to be told of them)."""
    first = models[0]
    module = first["module"]
    states = [found["optimizer_state_dict"] for found in partitions]
    facts: dict[str, Any] = {"stage": 0, "ranks": max(len(states), len(models)), "masters": False, "shared": {}}
    if not states:
        if any(tensor.numel() == 0 for tensor in module.values()):
            raise ValueError("ZeRO-3's weights are in *_optim_states.pt, which are not there")
        return {name: tensor.clone() for name, tensor in module.items()}, facts
    stage = int(states[0]["zero_stage"])
    _check_ranks(states)
    if stage == 3:
        shapes = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
        flats = [torch.cat([flat.flatten() for flat in state["fp32_flat_groups"]]) for state in states]
        tensors = cut(flats, shapes)
        frozen = first.get("frozen_param_shapes") or {}
        if frozen:
            fragments = [model["frozen_param_fragments"] for model in models]
            for name, shape in frozen.items():
                tensors |= cut([fragment[name].flatten() for fragment in fragments], {name: shape})
    else:
        tensors = {}
        paddings = states[0].get("param_alignment_paddings") or [None] * len(first["param_shapes"])
        for number, (shapes, padding) in enumerate(zip(first["param_shapes"], paddings, strict=True)):
            flat = torch.cat([state["single_partition_of_fp32_groups"][number].flatten() for state in states])
            tensors |= unflatten(flat, shapes, padding)
    shared = {name: source for name, source in dict(first.get("shared_params") or {}).items() if name not in tensors}
    # Buffers, and before ZeRO-3 parameters that were not trained; a partitioned parameter is empty there.
    others = {name for name in module if name not in tensors and name not in shared}
    tensors |= {name: module[name].clone() for name in others}
    return tensors, {**facts, "stage": stage, "masters": True, "shared": shared}


def unflatten(flat: Tensor, shapes: Mapping[str, Any], paddings: list[int] | None) -> dict[str, Tensor]:
    """Tensors that lie one after the other in a flat one, each followed by its padding. Raises ValueError if short."""
    found, start = {}, 0
    for name, shape, padding in zip(shapes, shapes.values(), paddings or [0] * len(shapes), strict=True):
        size = math.prod(shape)
        if start + size > flat.numel():
            raise ValueError(f"{name} needs {start + size} elements, and the partitions hold {flat.numel()}")
        found[name] = flat[start : start + size].reshape(tuple(shape)).clone()
        start += size + padding
    return found


def cut(flats: list[Tensor], shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of which each rank's flat one holds an equal, padded interval. Raises ValueError if they are short."""
    found, start = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        interval = -(-size // len(flats))
        whole = torch.cat([flat[start : start + interval] for flat in flats])[:size]
        if whole.numel() < size:
            raise ValueError(f"{name} needs {size} elements, and the partitions hold {whole.numel()}")
        found[name] = whole.reshape(tuple(shape)).clone()
        start += interval
    return found


def _check_ranks(states: list[dict[str, Any]]) -> None:
    """Raise ValueError where a rank's file is missing."""
    said = states[0].get("partition_count", len(states))
    count = max(said) if isinstance(said, list) else int(said)
    if count != len(states):
        raise ValueError(f"{count} ranks wrote the checkpoint, and there are files of {len(states)}")


if __name__ == "__main__":
    main(sys.argv[1])
