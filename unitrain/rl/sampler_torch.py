"""A rollout actor's own engine: the policy's module as the trainer has it, and `generate_torch`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..digest import box_digest
from ..errors import UnitrainError
from .generate_torch import Response, generate
from .sampler import Plan, Tensors
from .sampling import Sampling

_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchSampler:
    """See Sampler."""

    def __init__(self, plan: Plan) -> None:
        self._device = torch.device("cuda" if plan.gpu and torch.cuda.is_available() else "cpu")
        torch.set_num_threads(plan.threads)
        self._compute = _COMPUTE.get(plan.precision)
        self.model: torch.nn.Module = plan.model().to(self._device).eval().requires_grad_(False)
        self._held = held(self.model)

    def load(self, tensors: Tensors) -> None:
        """See Sampler."""
        for name, (dtype, data) in tensors.items():
            own = self._held.get(name)
            if own is None or tuple(own.shape) != data.shape:
                there = "none" if own is None else f"one of {tuple(own.shape)}"
                raise UnitrainError(
                    f"the policy has a tensor {name} of {data.shape}, and the model that the rollout built has "
                    f"{there}; rollout_model() must build what build_model() does"
                )
            tensor = torch.from_numpy(data.copy())  # what Ray hands out is read-only
            tensor = tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
            if own.dtype != tensor.dtype:
                own.data = own.data.to(tensor.dtype)
            own.data.copy_(tensor)

    def digests(self, names: Sequence[str]) -> dict[str, int]:
        """See Sampler."""
        return {name: _digest(self._held[name]) for name in names}

    def generate(
        self, prompts: Sequence[NDArray[np.int64]], seeds: NDArray[np.uint64], sampling: Sampling
    ) -> list[Response]:
        """See Sampler."""
        with _precision(self._device, self._compute):
            return generate(self.model, prompts, seeds, sampling)


def held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by their canonical names, each tied one once."""
    kept = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A C-contiguous array that shares memory where it can; bfloat16 as its bits."""
    tensor = tensor.detach().contiguous().cpu()
    found: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def _digest(tensor: torch.Tensor) -> int:
    return box_digest(as_numpy(tensor), tuple(tensor.shape), (0,) * tensor.ndim)


def _precision(device: torch.device, compute: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if compute is None else torch.autocast(device.type, compute)
