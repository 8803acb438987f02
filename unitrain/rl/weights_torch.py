"""The policy's weights as one process can send them: whole tensors on rank 0, however ranks hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..strategy import Engine
from .rows_torch import Rows
from .sampler import Tensor, Tensors, Weights
from .sampler_torch import as_numpy, held

_INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}

Initial = Callable[[str, tuple[int, ...]], NDArray[np.float32]]


class Outbox:
    """Gathers one version after the other; what no update moves is gathered once."""

    def __init__(self, engine: Engine, rows: Rows, model: Callable[[], Any], initial: Initial) -> None:
        """`model` builds the module, for names and shapes; `initial` gives frozen parameters that no checkpoint has."""
        self._engine, self._rows, self._initial = engine, rows, initial
        with torch.device("meta"):
            self._wanted = held(model().to("meta"))
        self._still: set[str] | None = None  # what has been gathered and does not move

    def gather(self, version: int) -> Weights:
        """The weights on rank 0; on other ranks without tensors. A collective."""
        digests = self._engine.digest()
        frozen = {name for name, tensor in self._wanted.items() if _still(tensor)}
        first, self._still = self._still is None, frozen
        names = list(digests) if first else [name for name in digests if name not in frozen]
        tensors = self._engine.call(self._whole, names)
        if tensors is None:
            tensors = self._assembled(names)
        moving = {name: tensor for name, tensor in tensors.items() if name not in frozen}
        still = {name: tensor for name, tensor in tensors.items() if name in frozen}
        return Weights(version, still, moving, digests)

    def again(self) -> None:
        """Gather everything next time: the receivers are new."""
        self._still = None

    def _whole(self, model: nn.Module, names: list[str]) -> Tensors | None:
        """Where every rank holds all as plain fp32; None elsewhere. The same answer on every rank."""
        found = held(model)
        for name in names:
            own, wanted = found.get(name), self._wanted[name]
            if own is None or type(own.data) is not torch.Tensor or own.shape != wanted.shape:
                return None
            if own.is_floating_point() and own.dtype != torch.float32:
                return None  # the numbers that count are elsewhere, in fp32
        if self._rows.rank != 0:
            return {}
        return {name: _tensor(as_numpy(found[name])) for name in names}

    def _assembled(self, names: list[str]) -> Tensors:
        """From the ranks' boxes."""
        boxes: dict[str, list[Any]] = {}
        for shard in self._engine.shards(("param", "buffer")):
            boxes.setdefault(shard.name, []).append(shard)
        found: dict[str, Tensor] = {}
        for name in names:
            wanted = self._wanted[name]
            own = boxes.get(name, [])
            known = np.array([len(own)], dtype=np.int64)
            if not self._rows.summed(known)[0]:
                if self._rows.rank == 0:
                    found[name] = _tensor(np.ascontiguousarray(self._initial(name, tuple(wanted.shape))))
                continue
            kind = as_numpy(torch.zeros(0, dtype=wanted.dtype)).dtype
            # As integers: adding zeros to floats would lose the sign of -0.0, and with it the digest.
            table = np.zeros(tuple(wanted.shape), dtype=_INTEGERS[kind.itemsize])
            for shard in own:
                place = tuple(slice(at, at + size) for at, size in zip(shard.offset, shard.data.shape, strict=True))
                table[place] = shard.data.view(table.dtype)
            table = self._rows.summed(table)
            if self._rows.rank == 0:
                found[name] = _tensor(table.view(kind))
        return found


def _tensor(data: NDArray[Any]) -> Tensor:
    # uint16 is how bfloat16 travels; no model has tensors of uint16 itself.
    return Tensor("bfloat16" if data.dtype == np.uint16 else str(data.dtype), data)


def _still(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad
