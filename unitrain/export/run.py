"""From a run to an exported folder: which checkpoint, as what, and where to."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .. import registry
from ..checkpoint import CheckpointReader, list_checkpoints, open_newest
from ..errors import UserError
from ..models.config import GPT
from ..models.hf_config import HF
from ..recipe import Recipe
from ..recipe_file import load_recipe, to_dict
from ..run import Run
from ..schema import build
from . import plans
from .pieces import Plan
from .writer import refuse_taken, write_folder

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULT_SHARD = "4GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Summary(NamedTuple):
    """What an export wrote."""

    folder: Path
    step: int
    what: str
    files: list[Path]
    num_bytes: int


def export(
    run: Run,
    to: Path,
    *,
    step: int | None = None,
    dtype: str = "fp32",
    max_shard_size: str = DEFAULT_SHARD,
    merge: bool = False,
    role: str = "model",
) -> Summary:
    """Write a folder that others load, from the newest checkpoint or that of a step, whoever wrote it.

    Tensors are read and written some rows at a time: no more of the model than that is ever in memory. Adapters (LoRA)
    become a folder for peft, or the whole model with `merge`. Raises UserError where there is no such checkpoint or
    `to` is taken, CheckpointDamaged where its bytes are not what was saved.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    most = shard_bytes(max_shard_size)
    to = to.absolute()
    refuse_taken(to)
    recipe = load_recipe(run.recipe_path)
    checkpoint = _checkpoint(run, recipe, step)
    plan = _plan(run, recipe, checkpoint, role, DTYPES[dtype], merge)
    files = write_folder(plan, to, most)
    return Summary(to, checkpoint.step, plan.what, files, sum(file.stat().st_size for file in files))


def shard_bytes(text: str) -> int:
    """Bytes of `500MB`, `1GB`, `2GiB` or a plain number. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", text.strip().upper())
    amount = float(found[1]) * _UNITS.get(found[2] or "", 0) if found else 0
    if amount < 1:
        raise UserError(f"--max-shard-size is {text!r}; write it as 500MB, 1GB or 2GiB")
    return int(amount)


def _checkpoint(run: Run, recipe: Recipe, step: int | None) -> CheckpointReader:
    root = run.checkpoints(recipe)
    if step is None:
        newest = open_newest(root, verify="manifest")
        if newest.reader is None:
            reason = newest.passed_over[0].reason if newest.passed_over else "it saved none"
            raise UserError(f"{run.id} has no checkpoint that can be exported: {reason}")
        return CheckpointReader(newest.reader.folder)
    catalog = list_checkpoints(root)
    for found in catalog.sound:
        if found.step == step:
            return CheckpointReader(found.folder)
    known = ", ".join(str(found.step) for found in catalog.sound) or "none"
    raise UserError(f"{run.id} has no checkpoint of step {step}; it has {known}")


def _plan(run: Run, recipe: Recipe, checkpoint: CheckpointReader, role: str, dtype: str, merge: bool) -> Plan:
    reader = checkpoint.role(role)
    base = Path(run.launched().get("cwd") or Path.cwd())  # where relative paths of the recipe start
    kind = registry.load("models", recipe.model.name) if recipe.model.name in registry.entries("models") else None
    options: Any = None if kind is None else build(kind, recipe.model.options, "model")
    adapted = isinstance(options, HF) and options.lora is not None
    if merge and not adapted:
        raise UserError(f"--merge is for runs with model.lora, and {run.id} has none; leave it out")
    heads = [reader.tensors.get(("param", f"{name}.weight")) for name in ("head", "lm_head")]
    if any(head is not None and head.shape[0] == 1 for head in heads):  # a critic's or a reward model's
        return plans.plain(reader, to_dict(recipe).get("model", {}), dtype)
    if isinstance(options, GPT) and ("param", "embed.weight") in reader.tensors:
        return _with_tokenizer(plans.gpt(reader, options, dtype), recipe, base, None)
    if not isinstance(options, HF):
        return plans.plain(reader, to_dict(recipe).get("model", {}), dtype)
    options = options.located(base)
    if not adapted:
        return _with_tokenizer(plans.hf(reader, options, dtype), recipe, base, options.path)
    plans.refuse_other_base(options, checkpoint.state.get("identity", {}).get("base model"))
    if not merge:
        return _with_tokenizer(plans.adapters(reader, options, dtype), recipe, base, options.path)
    return _with_tokenizer(plans.merged(reader, options, dtype, recipe.train.seed), recipe, base, options.path)


def _with_tokenizer(plan: Plan, recipe: Recipe, base: Path, model: str | None) -> Plan:
    """The same with the tokenizer that the data was read by, or that lies beside the model."""
    named = recipe.data.options.get("tokenizer", "bytes")
    files = [] if named == "bytes" else plans.tokenizer_files(str(base / Path(str(named)).expanduser()))
    if not files and model is not None:
        files = plans.tokenizer_files(model)
    names = {file.name for file in files}
    if "tokenizer.json" in names and "tokenizer_config.json" not in names:
        # Without it transformers would guess the class by the model.
        extra = {"tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n'}
        return replace(plan, copies=files, files={**plan.files, **extra})
    return replace(plan, copies=files)
