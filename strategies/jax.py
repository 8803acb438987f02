"""JAX: every optimizer step is one compiled program over a mesh of devices; XLA does the talking between them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from numpy.typing import NDArray

from unitrain.strategies import _jax_refusals
from unitrain.strategies._jax_batch import Placed, place
from unitrain.strategies._jax_engine import JaxEngine
from unitrain.strategies._jax_mesh import DeviceMesh
from unitrain.strategies._jax_model import define
from unitrain.strategies._jax_ranks import Ranks
from unitrain.strategy import Role, Strategy
from unitrain.world import World

# dense bf16 FLOP/s of one device, from the vendors' data sheets; for MFU
PEAK_FLOPS = {
    **{"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12, "V100": 125e12},
    **{"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12},
}


class Jax(Strategy):
    """A mesh of `data`, `fsdp` and `tensor` axes over all devices, `local_devices` of each rank; `remat`."""

    name: ClassVar[str] = "jax"
    framework: ClassVar[str] = "jax"
    even: ClassVar[bool] = True
    problems = staticmethod(_jax_refusals.jax)

    @property
    def options(self) -> Mapping[str, Any]:
        """The recipe's `strategy.options`."""
        return self.recipe.strategy.options

    def open(self, world: World) -> None:
        """See Strategy."""
        self.world = world
        self.engines: list[JaxEngine] = []
        self.ranks: Ranks | None = Ranks(world, _jax_refusals.local_devices(self.options))
        sizes = _jax_refusals.mesh_sizes(self.options, len(self.ranks.devices))
        self.mesh = DeviceMesh(sizes, self.ranks.devices)

    def bind(self, role: Role, seed: int) -> JaxEngine:
        """See Strategy."""
        definition = define(role, seed, remat=bool(self.options.get("remat")))
        engine = JaxEngine(definition, role, seed, self.recipe, self.mesh, self._ranks, self.engines)
        self.engines.append(engine)
        return engine

    def place(self, arrays: Mapping[str, NDArray[Any]]) -> Placed:
        """See Strategy. The arrays themselves, which hold on to what of them lies on the devices."""
        return place(arrays, self.mesh)

    def data_share(self, world: World) -> tuple[int, int]:
        """See Strategy. Ranks of one `tensor` group load the same share."""
        each = _jax_refusals.local_devices(self.options)
        tensor = _jax_refusals.mesh_sizes(self.options, world.size * each).tensor
        ranks = max(tensor // each, 1)  # of one group
        return world.rank // ranks, world.size // ranks

    def share(self, text: str) -> str:
        """See Strategy."""
        shared: str = self._ranks.meeting.share(text)
        return shared

    def barrier(self) -> None:
        """See Strategy."""
        self._ranks.meeting.barrier()

    def memory_bytes(self) -> int:
        """See Strategy."""
        found = [device.memory_stats() or {} for device in self.mesh.local]
        return sum(stats.get("peak_bytes_in_use", 0) for stats in found) or super().memory_bytes()

    def peak_flops(self) -> float | None:
        """See Strategy."""
        kind = self.mesh.local[0].device_kind
        flops = next((flops for part, flops in PEAK_FLOPS.items() if part in kind), None)
        return None if flops is None else flops * len(self.mesh.local)

    def close(self) -> None:
        """See Strategy."""
        ranks, self.ranks = getattr(self, "ranks", None), None
        if ranks is not None:
            failed = sys.exception()
            ranks.leave(failed=failed is not None and not isinstance(failed, GeneratorExit))

    @property
    def _ranks(self) -> Ranks:
        assert self.ranks is not None, "the strategy is open"
        return self.ranks
