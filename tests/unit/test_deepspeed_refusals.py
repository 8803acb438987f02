"""The DeepSpeed strategies take a DeepSpeed configuration, and refuse by name what the recipe says itself."""

from __future__ import annotations

from typing import Any

import pytest

from unitrain import registry
from unitrain.recipe import OptimizerRecipe, Recipe, StrategyRecipe
from unitrain.strategies import _torch_refusals
from unitrain.strategy import Cluster

pytestmark = pytest.mark.fast

STRATEGIES = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


def refusals(strategy: str, moved_by: str = "adamw", **options: Any) -> list[str]:
    recipe = Recipe(
        trainer="a:b",
        optimizer=OptimizerRecipe(name=moved_by),
        strategy=StrategyRecipe(name=strategy, options=options),
    )
    problems = registry.resolve(registry.STRATEGIES[strategy].problems)(recipe, Cluster(nodes=1, nproc=2))
    return [f"{problem.what}; {problem.instead}" for problem in problems]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_plain_configuration_passes(strategy: str) -> None:
    zero = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
    assert refusals(strategy) == []
    assert refusals(strategy, zero_optimization=zero, wall_clock_breakdown=True, activation_checkpointing=True) == []


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("train_batch_size", "train.global_batch"),
        ("train_micro_batch_size_per_gpu", "train.micro_batch"),
        ("gradient_accumulation_steps", "train.global_batch"),
        ("gradient_clipping", "optimizer.clip"),
        ("optimizer", "optimizer"),
        ("scheduler", "schedule"),
        ("bf16", "train.precision"),
        ("fp16", "train.precision"),
    ],
)
def test_what_the_recipe_says_is_refused_with_its_key_there(key: str, ours: str) -> None:
    (refusal,) = refusals("zero2", **{key: 1})
    assert refusal.startswith(f"strategy.options.{key} would contradict the recipe; ")
    assert ours in refusal


def test_another_stage_is_refused_with_the_strategy_of_that_stage() -> None:
    (refusal,) = refusals("zero2", zero_optimization={"stage": 3})
    assert refusal == (
        "strategy.options.zero_optimization.stage is 3, and strategy 'zero2' is stage 2; use --strategy zero3"
    )


def test_offloads_are_refused_where_the_strategy_has_none() -> None:
    (refusal,) = refusals("zero3", zero_optimization={"offload_param": {"device": "cpu"}})
    assert "use --strategy zero3_offload" in refusal


def test_unknown_keys_are_refused_with_the_nearest_known_one() -> None:
    (outer,) = refusals("zero1", wall_clock_breakdwn=True)
    (inner,) = refusals("zero1", zero_optimization={"reduce_bucketsize": 5})
    assert "did you mean 'wall_clock_breakdown'?" in outer
    assert "did you mean 'reduce_bucket_size'?" in inner


def test_what_would_change_the_update_is_refused() -> None:
    (refusal,) = refusals("zero1", zero_optimization={"compute_grad_norm": False})
    assert "would change what an update is" in refusal
    (other,) = refusals("zero3", tensor_parallel={"autotp_size": 2})
    assert "does not take 'tensor_parallel'" in other


def test_nvme_needs_zero3_and_a_folder() -> None:
    assert "use --strategy zero3_offload for NVMe" in refusals("zero2_offload", offload="nvme", nvme_path="/x")[0]
    assert "nvme_path is not given" in refusals("zero3_offload", offload="nvme")[0]
    assert refusals("zero3_offload", offload="nvme", nvme_path="/x") == []
    assert "use cpu or nvme" in refusals("zero3_offload", offload="disk")[0]


def test_an_offloaded_optimizer_is_adamw() -> None:
    (refusal,) = refusals("zero2_offload", moved_by="sgd")
    assert "use optimizer.name: adamw, or --strategy zero2" in refusal
    assert refusals("zero2", moved_by="sgd") == []


def test_the_keys_of_zero_optimization_are_those_of_deepspeed() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    theirs = {field.alias or name for name, field in config.DeepSpeedZeroConfig.model_fields.items()}
    assert theirs == {*_torch_refusals.ZERO_KEYS, *_torch_refusals.ZERO_CHANGES}
