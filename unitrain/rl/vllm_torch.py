"""A rollout actor's engine that is vLLM: weights by its workers' `load_weights`, tokens in and out, no text.

Written for the interface of vLLM 0.11 and later, which needs a GPU of its own; its tests run against a stand-in. What
cannot be promised of another engine: a sample's draws follow from its seed, but by vLLM's generator, so that samples
are not those of our own engine; and what a worker holds is fused, so that digests are of what arrived there. That the
two agree is measured in every step: `gap` in metrics.jsonl.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ..digest import box_digest
from ..errors import MissingExtra, RecipeError, UnitrainError
from ..models.hf_config import HF
from .generate_torch import Response
from .sampler import Plan, Tensors
from .sampling import Sampling

MOST_BYTES = 256 << 20  # of tensors in one call to the workers
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_OURS = ("model", "load_format", "logprobs_mode", "worker_extension_cls", "skip_tokenizer_init", "seed")
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer.weight"
_SEED_BITS = 0x7FFF_FFFF_FFFF_FFFF  # vLLM hands it to torch as a signed number

Sent = tuple[str, str, list[int], bytes]  # name, numpy's dtype or bfloat16, shape, bytes: what any serialiser takes


class VLLMSampler:
    """See Sampler. `rl.rollout.options` are arguments of vllm.LLM, such as gpu_memory_utilization."""

    def __init__(self, plan: Plan) -> None:
        if not isinstance(plan.config, HF):
            raise RecipeError("rl.rollout.engine vllm generates with models of transformers; give model: {name: hf}")
        if taken := sorted(set(_OURS) & plan.options.keys()):
            raise RecipeError(f"rl.rollout.options.{taken[0]} is set by the recipe already; take it out")
        try:
            vllm = importlib.import_module("vllm")
        except ModuleNotFoundError as error:
            raise MissingExtra("rl.rollout.engine vllm", "vllm", "vllm") from error
        from ..models import hf_torch

        self._vllm: Any = vllm
        self._lora = plan.config.lora
        self._transposed = hf_torch.transposed_layers(plan.config) if self._lora is not None else set()
        self._parts: dict[str, torch.Tensor] = {}  # of adapted layers, which vLLM gets merged
        self._arrived: dict[str, int] = {}
        dtype = _DTYPES[plan.precision]
        own: dict[str, Any] = {
            "load_format": "dummy",  # weights come from the trainer
            "skip_tokenizer_init": True,
            "dtype": dtype,
            # After temperature: what the trainer computes. Before it, they would be another distribution's.
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": f"{__name__}.Receiver",
            "seed": 0,
        }
        values = hf_torch.saved_config(dataclasses.replace(plan.config, lora=None), dtype)
        with tempfile.TemporaryDirectory(prefix="unitrain-vllm-") as folder:  # read while workers start
            Path(folder, "config.json").write_text(json.dumps(values), encoding="utf-8")
            self._llm: Any = vllm.LLM(model=folder, **{**own, **plan.options})

    def load(self, tensors: Tensors) -> None:
        """See Sampler."""
        arrived = {name: box_digest(data, data.shape, (0,) * data.ndim) for name, (_, data) in tensors.items()}
        for part in _portions(self._for_vllm(tensors)):
            wanted = [box_digest(*_digested(each)) for each in part]
            for found in self._llm.collective_rpc("take_weights", args=(part,)):
                if list(found) != wanted:
                    raise UnitrainError("a worker of vLLM received other weights than it was sent")
        self._arrived |= arrived
        self._llm.reset_prefix_cache()  # it holds what other weights computed

    def digests(self, names: Sequence[str]) -> dict[str, int]:
        """Of what arrived: vLLM holds fused tensors."""
        return {name: self._arrived[name] for name in names}

    def generate(
        self, prompts: Sequence[NDArray[np.int64]], seeds: NDArray[np.uint64], sampling: Sampling
    ) -> list[Response]:
        """See Sampler."""
        if sampling.temperature and (sampling.top_k is not None or sampling.top_p < 1):
            raise RecipeError(
                "rl.sampling.top_k and top_p are not for rl.rollout.engine vllm: it would give the log-probabilities "
                "of the restricted draw; leave them out"
            )
        asked = [
            self._vllm.SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                seed=int(seed) & _SEED_BITS,
                stop_token_ids=list(sampling.stop),
                ignore_eos=True,  # what ends a response is in `stop`
                logprobs=0,  # of the drawn tokens alone
                detokenize=False,
            )
            for seed in seeds.tolist()
        ]
        rows = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        return [_response(row.outputs[0]) for row in self._llm.generate(rows, asked, use_tqdm=False)]

    def _for_vllm(self, tensors: Tensors) -> Iterable[Sent]:
        """As vLLM knows them: adapters are added to the weights beside them."""
        changed: dict[str, None] = {}
        for name, (dtype, data) in tensors.items():
            layer = next((name.removesuffix(end) for end in (_A, _B, _BASE) if name.endswith(end)), None)
            if self._lora is None or layer is None:
                yield name.replace(".base_layer.", "."), dtype, list(data.shape), np.ascontiguousarray(data).tobytes()
            else:
                self._parts[name] = torch.from_numpy(data.copy())
                changed[layer] = None
        for layer in changed:
            assert self._lora is not None, "checked above"
            parts = [self._parts.get(f"{layer}{end}") for end in (_BASE, _A, _B)]
            if any(part is None for part in parts):
                continue  # the rest comes with the next call
            base, a, b = cast(list[torch.Tensor], parts)
            added = (b @ a) * (self._lora.alpha / self._lora.r)
            merged: Any = base + (added.T if f"{layer}{_BASE}" in self._transposed else added)
            merged = np.ascontiguousarray(merged.numpy())
            yield f"{layer}.weight", str(merged.dtype), list(merged.shape), merged.tobytes()


class Receiver:
    """What every worker of vLLM has besides its own methods (`worker_extension_cls`)."""

    model_runner: Any  # the worker's

    def take_weights(self, sent: Sequence[Sent]) -> list[int]:
        """Load tensors; the digest of each as it arrived."""
        named, digests = [], []
        for each in sent:
            name, dtype, shape, data = each
            digests.append(box_digest(*_digested(each)))
            kind = getattr(torch, dtype)
            named.append((name, torch.frombuffer(bytearray(data), dtype=kind).view(tuple(shape))))
        self.model_runner.model.load_weights(named)
        return digests


def _digested(sent: Sequence[Any]) -> tuple[NDArray[Any], tuple[int, ...], tuple[int, ...]]:
    _, dtype, shape, data = sent
    array = np.frombuffer(data, dtype="uint16" if dtype == "bfloat16" else dtype).reshape(tuple(shape))
    return array, tuple(shape), (0,) * len(shape)


def _portions(sent: Iterable[Sent]) -> Iterable[list[Sent]]:
    """Lists of at most MOST_BYTES, or of one tensor."""
    found: list[Sent] = []
    size = 0
    for each in sent:
        if found and size + len(each[3]) > MOST_BYTES:
            yield found
            found, size = [], 0
        found.append(each)
        size += len(each[3])
    if found:
        yield found


def _response(output: Any) -> Response:
    tokens = np.asarray(output.token_ids, dtype=np.int64)
    chances: list[Mapping[int, Any]] = list(output.logprobs or [])
    if len(chances) != len(tokens):
        raise UnitrainError(f"vLLM gave {len(tokens)} tokens and {len(chances)} log-probabilities")
    logprobs = [chance[token].logprob for chance, token in zip(chances, tokens.tolist(), strict=True)]
    return Response(tokens, np.asarray(logprobs, dtype=np.float32), output.finish_reason == "stop")
