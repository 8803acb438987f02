"""Every built-in strategy keeps the contract, with its options too."""

from __future__ import annotations

from unitrain.testing import StrategyContract


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
