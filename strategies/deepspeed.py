"""DeepSpeed ZeRO: optimizer state, then gradients, then parameters partitioned over the ranks (Rajbhandari, 2020)."""

from __future__ import annotations

from typing import ClassVar

from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch_deepspeed import DeepSpeedStrategy


class Zero1(DeepSpeedStrategy):
    """Optimizer state partitioned."""

    name: ClassVar[str] = "zero1"
    stage = 1
    problems = staticmethod(_torch_refusals.zero1)


class Zero2(DeepSpeedStrategy):
    """Gradients partitioned too."""

    name: ClassVar[str] = "zero2"
    stage = 2
    problems = staticmethod(_torch_refusals.zero2)


class Zero3(DeepSpeedStrategy):
    """Parameters partitioned too."""

    name: ClassVar[str] = "zero3"
    stage = 3
    problems = staticmethod(_torch_refusals.zero3)


class Zero2Offload(DeepSpeedStrategy):
    """ZeRO-2 whose masters and moments live in host memory, where DeepSpeedCPUAdam moves them."""

    name: ClassVar[str] = "zero2_offload"
    stage, offloads = 2, ("offload_optimizer",)
    problems = staticmethod(_torch_refusals.zero2_offload)


class Zero3Offload(DeepSpeedStrategy):
    """ZeRO-3 whose parameters, masters and moments live in host memory, or with `offload: nvme` in `nvme_path`."""

    name: ClassVar[str] = "zero3_offload"
    stage, offloads = 3, ("offload_optimizer", "offload_param")
    problems = staticmethod(_torch_refusals.zero3_offload)
