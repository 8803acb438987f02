"""The mesh of devices: which of them holds which rows of a batch, and which part of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from unitrain.cursor import rank_rows
from unitrain.strategies._jax_refusals import AXES, MeshSizes

ROWS = ("data", "fsdp")  # the axes over which the rows of a batch are cut
SMALL_VECTOR = 1 << 16  # a vector below this many numbers is not worth the messages that sharding it costs


class DeviceMesh:
    """Devices in three axes, rank by rank; the devices of one `tensor` group hold the same rows."""

    def __init__(self, sizes: MeshSizes, devices: Sequence[Any]) -> None:
        self.sizes = sizes
        self.mesh = Mesh(np.array(devices, dtype=object).reshape(sizes), AXES)
        self.replicated = self.sharding(())
        self.local = [device for device in devices if device.process_index == jax.process_index()]
        self.local_shards = max(len(self.local) // sizes.tensor, 1)

    def sharding(self, axes: Sequence[Any]) -> NamedSharding:
        """Axis by axis of a tensor: the mesh axes that cut it, or None."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def place_rows(self, rows: NDArray[Any]) -> jax.Array:
        """A global array from what this rank has of it: as many rows for each of its shards, shard by shard."""
        each = len(rows) // self.local_shards
        per_shard = len(self.local) // self.local_shards
        parts = [rows[number // per_shard * each :][:each] for number in range(len(self.local))]
        placed = jax.device_put(parts, self.local)
        return jax.make_array_from_single_device_arrays(
            (each * self.sizes.shards, *rows.shape[1:]), self.sharding([ROWS]), placed
        )

    def axes_of(self, shape: Sequence[int], tensor_axis: int | None) -> tuple[str | None, ...]:
        """How a parameter of that shape is cut: one axis by `tensor`, the longest other one that it can by `fsdp`."""
        axes: list[str | None] = [None] * len(shape)
        if tensor_axis is not None and self.sizes.tensor > 1 and shape[tensor_axis] % self.sizes.tensor == 0:
            axes[tensor_axis] = "tensor"
        free = [axis for axis, size in enumerate(shape) if axes[axis] is None and size % self.sizes.fsdp == 0]
        worth = len(shape) > 1 or math.prod(shape) >= SMALL_VECTOR
        if self.sizes.fsdp > 1 and free and worth:
            axes[max(free, key=lambda axis: shape[axis])] = "fsdp"
        return tuple(axes)


def local_boxes(array: jax.Array) -> Iterator[tuple[tuple[int, ...], NDArray[Any]]]:
    """(offset, data) of what this rank writes of an array. The ranks that hold the same box share it by rows."""
    owners: dict[tuple[int, ...], set[int]] = {}
    everywhere: Mapping[Any, tuple[slice, ...]] = array.sharding.devices_indices_map(array.shape)
    for device, index in everywhere.items():
        owners.setdefault(_begin(index), set()).add(device.process_index)
    written = set()
    for shard in array.addressable_shards:
        assert shard.index is not None, "a sharding of ours says where each part lies"
        begin = _begin(shard.index)
        if begin in written:
            continue
        written.add(begin)
        ranks = sorted(owners[begin])
        place = ranks.index(jax.process_index())
        if not array.ndim or not array.size:
            if place == 0:
                yield begin, np.asarray(shard.data)
            continue
        rows = rank_rows(shard.data.shape[0], place, len(ranks))
        if rows:
            whole = len(rows) == shard.data.shape[0]
            data = np.asarray(shard.data if whole else shard.data[rows.start : rows.stop])
            yield (begin[0] + rows.start, *begin[1:]), data


def _begin(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index)
