"""What each kind of model becomes: GPTs as Llama, models of transformers as themselves, adapters for peft or merged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import registry
from ..checkpoint.reader import RoleReader
from ..errors import CheckpointMismatch, UserError
from ..models.config import GPT
from ..models.hf_config import HF
from .pieces import Plan, Tensor, as_stored, converted, read_rows, to_dtype

HF_MODULE = "unitrain.models.hf_torch"
FORMAT = "unitrain"  # of folders that no other library knows
_BASE, _ADAPTER = ".base_layer", ".default"


def plain(reader: RoleReader, model: Mapping[str, Any], dtype: str) -> Plan:
    """Parameters and buffers by their canonical names, and the recipe's `model:` in config.json."""
    tensors = [as_stored(reader, kind, name, dtype) for kind, name in reader.tensors if kind in ("param", "buffer")]
    values = {"format": FORMAT, "model": dict(model), "dtype": dtype}
    return Plan(tensors=tensors, files={"config.json": _json(values)}, what="weights under unitrain's own names")


def gpt(reader: RoleReader, options: GPT, dtype: str) -> Plan:
    """A LlamaForCausalLM: the same architecture, with the one matrix of queries, keys and values cut in three."""
    vocab_size = reader.tensors["param", "embed.weight"].shape[0]
    options = dataclasses.replace(options, vocab_size=vocab_size)
    shape = options.shape()
    whole = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not options.tied:
        whole["head.weight"] = "lm_head.weight"
    cut: dict[str, tuple[str, int]] = {}  # exported name -> its source and which third of it
    for number in range(shape.layers):
        ours, theirs = f"blocks.{number}", f"model.layers.{number}"
        whole |= {
            f"{ours}.attention_norm.weight": f"{theirs}.input_layernorm.weight",
            f"{ours}.attention.out.weight": f"{theirs}.self_attn.o_proj.weight",
            f"{ours}.mlp_norm.weight": f"{theirs}.post_attention_layernorm.weight",
            f"{ours}.mlp.gate.weight": f"{theirs}.mlp.gate_proj.weight",
            f"{ours}.mlp.up.weight": f"{theirs}.mlp.up_proj.weight",
            f"{ours}.mlp.down.weight": f"{theirs}.mlp.down_proj.weight",
        }
        for place, part in enumerate("qkv"):
            cut[f"{theirs}.self_attn.{part}_proj.weight"] = (f"{ours}.attention.qkv.weight", place)
    tensors = [as_stored(reader, "param", ours, dtype, exported=theirs) for ours, theirs in whole.items()]
    tensors += [_third(reader, source, place, dtype, name) for name, (source, place) in cut.items()]
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": options.max_len,
        "rms_norm_eps": options.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": options.rope_theta},
        "rope_theta": options.rope_theta,  # where versions before 5 look
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": options.dropout,
        "tie_word_embeddings": options.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype,
    }
    return Plan(
        tensors=sorted(tensors), files={"config.json": _json(values)}, what="a LlamaForCausalLM of transformers"
    )


def hf(reader: RoleReader, options: HF, dtype: str) -> Plan:
    """The model of transformers itself."""
    tensors = [as_stored(reader, kind, name, dtype) for kind, name in reader.tensors if kind in ("param", "buffer")]
    values = registry.resolve(f"{HF_MODULE}:saved_config")(options, dtype)
    return Plan(tensors=tensors, files={"config.json": _json(values)}, what=f"a {values['architectures'][0]}")


def adapters(reader: RoleReader, options: HF, dtype: str) -> Plan:
    """What was trained, in a folder for peft."""
    values = registry.resolve(f"{HF_MODULE}:saved_adapter")(options)
    tensors = [
        as_stored(reader, kind, name, dtype, exported=f"base_model.model.{name.replace(_ADAPTER + '.', '.')}")
        for kind, name in reader.tensors
        if kind == "param"
    ]
    return Plan(
        tensors=tensors,
        stem="adapter_model",
        files={"adapter_config.json": _json(values)},
        what="adapters for peft",
    )


def merged(reader: RoleReader, options: HF, dtype: str, seed: int) -> Plan:
    """The whole model with its adapters added to the weights that they stand beside."""
    assert options.lora is not None, "a caller asked first"
    transposed: set[str] = registry.resolve(f"{HF_MODULE}:transposed_layers")(options)
    shapes: dict[str, tuple[int, ...]] = registry.resolve(f"{HF_MODULE}:parameters")(options)
    scale = options.lora.alpha / options.lora.r
    tensors = [as_stored(reader, kind, name, dtype) for kind, name in reader.tensors if kind == "buffer"]
    for name, shape in shapes.items():
        if ".lora_" in name:
            continue
        exported = name.replace(_BASE, "")
        if ("param", name) in reader.tensors:  # a head that was trained as a whole
            tensors.append(as_stored(reader, "param", name, dtype, exported=exported))
            continue
        rows = _base_rows(options, name, shape, seed)
        layer = name.removesuffix(f"{_BASE}.weight")
        if layer != name:
            rows = _with_adapter(reader, layer, rows, scale, name in transposed)
        tensors.append(Tensor(exported, dtype, shape, converted(rows, "float32", dtype)))
    values = registry.resolve(f"{HF_MODULE}:saved_config")(dataclasses.replace(options, lora=None), dtype)
    what = f"a {values['architectures'][0]} with its adapters merged"
    return Plan(tensors=tensors, files={"config.json": _json(values)}, what=what)


def tokenizer_files(path: str) -> list[Path]:
    """What belongs to a tokenizer: of a folder all that transformers saves, else the file alone."""
    place = Path(path)
    if place.is_dir():
        patterns = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
        return sorted({file for pattern in patterns for file in place.glob(pattern) if file.is_file()})
    return [place] if place.name == "tokenizer.json" and place.is_file() else []


def refuse_other_base(options: HF, recorded: Any) -> None:
    """Raise CheckpointMismatch where the folder's weights are not those that the adapters were trained on."""
    digest = str(recorded or "").partition(" ")[0]
    if digest and digest != options.base_digest():
        raise CheckpointMismatch(
            f"the adapters were trained on the base model {recorded}, but {options.path} holds another one; "
            "put the first one back"
        )


def _third(reader: RoleReader, source: str, place: int, dtype: str, name: str) -> Tensor:
    info = reader.tensors["param", source]
    length = info.shape[0] // 3

    def rows(start: int, stop: int) -> NDArray[Any]:
        return read_rows(reader, "param", source, start, stop, first=place * length)

    return Tensor(name, dtype, (length, *info.shape[1:]), converted(rows, info.dtype, dtype))


def _base_rows(options: HF, name: str, shape: tuple[int, ...], seed: int) -> Callable[[int, int], NDArray[Any]]:
    """Rows of a frozen weight: of the local folder, or drawn again as a whole."""
    held = None if options.path is None else options.held_name(name)
    if held is not None:
        return lambda start, stop: options.folder.rows(held, start, stop)
    return lambda start, stop: options.initial(name, shape, seed)[slice(start, stop) if shape else ()]


def _with_adapter(
    reader: RoleReader, layer: str, rows: Callable[[int, int], NDArray[Any]], scale: float, transposed: bool
) -> Callable[[int, int], NDArray[Any]]:
    """Rows of weight + scale * B A, of which the two factors are small."""
    down, up = (f"{layer}.lora_{side}{_ADAPTER}.weight" for side in "AB")
    for name in (down, up):
        if ("param", name) not in reader.tensors:
            raise UserError(f"the checkpoint has no {name}; it is of a run with other adapters")

    def factor(name: str, axis: int, start: int, stop: int) -> NDArray[np.float32]:
        shape = list(reader.tensors["param", name].shape)
        offset = [0] * len(shape)
        offset[axis], shape[axis] = start, stop - start
        return to_dtype(reader.read("param", name, tuple(offset), tuple(shape)), "float32")

    def added(start: int, stop: int) -> NDArray[np.float32]:
        rank, inputs = reader.tensors["param", down].shape
        outputs = reader.tensors["param", up].shape[0]
        if transposed:
            change = factor(down, 1, start, stop).T @ factor(up, 0, 0, outputs).T
        else:
            change = factor(up, 0, start, stop) @ factor(down, 1, 0, inputs)
        assert rank == reader.tensors["param", up].shape[1], "two factors of one product"
        whole: NDArray[np.float32] = rows(start, stop) + np.float32(scale) * change
        return whole

    return added


def _json(values: Mapping[str, Any]) -> bytes:
    """A file that people and programs read."""
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
