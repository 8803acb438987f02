"""Every built-in strategy keeps the contract, with its options too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from unitrain.testing import StrategyContract

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="needs Horovod: python -m unitrain.build horovod"
)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'unitrain[deepspeed]'"
)
needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow: pip install 'unitrain[tensorflow]'"
)
needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("flax") is None, reason="needs JAX and Flax: pip install 'unitrain[jax]'"
)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'unitrain[ray]'")
ACCELERATE = Path(__file__).parents[1] / "fixtures" / "accelerate"


class TestSingle(StrategyContract):
    strategy = "single"
    ranks = (1,)


class TestDDP(StrategyContract):
    strategy = "ddp"


class TestFSDP2(StrategyContract):
    strategy = "fsdp2"


class TestFSDP2Hybrid(StrategyContract):
    strategy = "fsdp2"
    options = {"shard_size": 2}
    ranks = (4,)


class TestFSDP2OptionsTogether(StrategyContract):
    strategy = "fsdp2"
    options = {"cpu_offload": True, "reshard_after_forward": False, "activation_checkpointing": True}
    ranks = (2,)


@needs_horovod
class TestHorovod(StrategyContract):
    strategy = "horovod"


@needs_horovod
class TestHorovodInManyBuckets(StrategyContract):
    strategy = "horovod"
    options = {"fusion_threshold_mb": 0.0001, "cycle_time_ms": 0.5}
    ranks = (3,)


class TestAccelerate(StrategyContract):
    strategy = "accelerate"


class TestAccelerateFSDP2(StrategyContract):
    strategy = "accelerate"
    options = {"config": str(ACCELERATE / "fsdp2.yaml")}


class TestAccelerateFSDP2Tuned(StrategyContract):
    strategy = "accelerate"
    options = {"config": str(ACCELERATE / "fsdp2_tuned.yaml")}
    ranks = (2,)


class TestAccelerateZero2(StrategyContract):
    strategy = "accelerate"
    options = {"config": str(ACCELERATE / "zero2.yaml")}


class TestAccelerateZero3Offload(StrategyContract):
    strategy = "accelerate"
    options = {"config": str(ACCELERATE / "zero3_offload.yaml")}
    ranks = (2,)


@needs_jax
class TestJax(StrategyContract):
    strategy = "jax"


@needs_jax
class TestJaxFSDP(StrategyContract):
    strategy = "jax"
    options = {"fsdp": 2}
    ranks = (2,)


@needs_jax
class TestJaxTensor(StrategyContract):
    strategy = "jax"
    options = {"tensor": 2}
    ranks = (2,)


@needs_jax
class TestJaxSeveralDevicesARank(StrategyContract):
    strategy = "jax"
    options = {"local_devices": 3}
    ranks = (1, 2)


@needs_jax
class TestJaxAllAxes(StrategyContract):
    strategy = "jax"
    options = {"local_devices": 4, "data": 2, "fsdp": 2, "tensor": 2, "remat": True}
    ranks = (2,)


@needs_deepspeed
class TestZero1(StrategyContract):
    strategy = "zero1"


@needs_deepspeed
class TestZero2(StrategyContract):
    strategy = "zero2"


@needs_deepspeed
class TestZero2InManyBuckets(StrategyContract):
    strategy = "zero2"
    options = {
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 20, "round_robin_gradients": True},
        "activation_checkpointing": True,
    }
    ranks = (3,)


@needs_deepspeed
class TestZero3(StrategyContract):
    strategy = "zero3"


@needs_deepspeed
class TestZero3WithoutWholeParameters(StrategyContract):
    strategy = "zero3"
    options = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    ranks = (3,)


@needs_deepspeed
class TestZero2Offload(StrategyContract):
    strategy = "zero2_offload"


@needs_deepspeed
class TestZero3Offload(StrategyContract):
    strategy = "zero3_offload"


@needs_deepspeed
class TestZero3OffloadInSmallGroups(StrategyContract):
    strategy = "zero3_offload"
    options = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 8}}
    ranks = (2,)


@needs_tensorflow
class TestTensorFlow(StrategyContract):
    strategy = "tensorflow"


@needs_tensorflow
class TestTensorFlowCompiled(StrategyContract):
    strategy = "tensorflow"
    options = {"jit_compile": True, "communication": "ring"}
    ranks = (2,)


@needs_ray
class TestRay(StrategyContract):
    strategy = "ray"


@needs_ray
class TestRayOfFSDP2(StrategyContract):
    strategy = "ray"
    options = {"inner": "fsdp2", "snapshot_every": 3}
    ranks = (2,)


@needs_ray
@needs_deepspeed
class TestRayOfZero2(StrategyContract):
    strategy = "ray"
    options = {"inner": "zero2"}
    ranks = (2,)


@needs_ray
@needs_jax
class TestRayOfJax(StrategyContract):
    strategy = "ray"
    options = {"inner": "jax"}
    ranks = (2,)


@needs_ray
@needs_tensorflow
class TestRayOfTensorFlow(StrategyContract):
    strategy = "ray"
    options = {"inner": "tensorflow"}
    ranks = (2,)
