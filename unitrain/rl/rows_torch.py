"""Rows of a global batch over ranks and micro-batches: updates, forward passes, and results on every rank.

All ranks hold the same rows on the host; each computes its share of them, cut as the Feed cuts batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..batch import Batch, MicroBatch
from ..cursor import micro_rows, mix, num_microbatches, rank_rows
from ..strategy import Engine, Strategy
from ..world import World

Arrays = Mapping[str, NDArray[Any]]
Pass = Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, ...]]  # results with the micro-batch's rows first


class _Ranks(Protocol):
    def sum(self, tensor: Tensor) -> None: ...


class Rows:
    """This rank among those of a torch strategy."""

    def __init__(self, engine: Engine, strategy: Strategy, world: World, micro_batch: int | None) -> None:
        self._ranks: _Ranks = cast(Any, engine).ranks  # every torch engine has them
        self._strategy, self._micro_batch = strategy, micro_batch
        self.rank, self.size = strategy.data_share(world)

    def own(self, rows: int) -> range:
        """The rows that this rank computes."""
        return rank_rows(rows, self.rank, self.size)

    def batch(self, step: int, arrays: Arrays, rows: NDArray[np.int64], key: int) -> Batch:
        """These rows as a batch for `Engine.update`."""
        return Batch(step, rows, lambda: [self._micro(arrays, rows, part, key) for part in self._parts(len(rows))])

    def forward(
        self, engine: Engine, function: Pass, arrays: Arrays, parts: Sequence[NDArray[np.int64]]
    ) -> list[NDArray[Any]]:
        """What the function says of each row, in evaluation mode and without gradients, on every rank. A collective.

        `parts` are the rows of one call of an update each: the same rows then meet the same arithmetic.
        """
        places = [(rows, part) for rows in parts for part in self._parts(len(rows))]
        micros = [self._micro(arrays, rows, part, 0) for rows, part in places]

        def run(model: nn.Module) -> list[tuple[Tensor, ...]]:
            return [tuple(each.float().cpu() for each in function(model, micro.arrays)) for micro in micros]

        found = engine.call(run)
        total = len(next(iter(arrays.values())))
        tables = [torch.zeros(total, *each.shape[1:]) for each in found[0]]
        for (rows, part), results in zip(places, found, strict=True):
            chosen = torch.from_numpy(rows[part.start : part.stop])
            for table, result in zip(tables, results, strict=True):
                table[chosen] = result[: len(chosen)]
        for table in tables:
            self._ranks.sum(table)
        return [table.numpy() for table in tables]

    def summed(self, own: NDArray[Any]) -> NDArray[Any]:
        """The sum of every rank's array, for tables that each rank fills in part. A collective."""
        if self.size == 1:
            return own
        wide = own.astype(np.int32) if own.dtype == np.int16 else own.copy()  # gloo has no int16
        tensor = torch.from_numpy(wide)
        self._ranks.sum(tensor)
        found: NDArray[Any] = tensor.numpy().astype(own.dtype, copy=False)
        return found

    def _parts(self, rows: int) -> list[range]:
        return micro_rows(self.own(rows), num_microbatches(rows, self.size, self._micro_batch))

    def _micro(self, arrays: Arrays, rows: NDArray[np.int64], part: range, key: int) -> MicroBatch:
        chosen = rows[part.start : part.stop] if part else rows[:1]
        placed = self._strategy.place({name: array[chosen] for name, array in arrays.items()})
        return MicroBatch(placed, len(chosen), mix(key, part.start), filler=not part)
