"""Strategies refuse what they cannot honour, each time with an alternative, and without importing a framework."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from torch.nn.parallel import DistributedDataParallel

from unitrain import registry
from unitrain.recipe import Recipe, StrategyRecipe
from unitrain.strategies import _torch_refusals
from unitrain.strategy import Cluster

pytestmark = pytest.mark.fast

NOT_THE_RECIPES = {
    "module",
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "device_mesh",
    "mixed_precision",
    "delay_all_reduce_named_params",
    "param_to_hook_all_reduce",
    "broadcast_buffers",  # deprecated in favour of forward_sync_buffers
}


def refusals(strategy: str, nproc: int = 2, **options: object) -> list[str]:
    recipe = Recipe(trainer="a:b", strategy=StrategyRecipe(name=strategy, options=options))
    found = registry.load("strategies", strategy).problems(recipe, Cluster(nodes=1, nproc=nproc))
    return [f"{problem.what}; {problem.instead}" for problem in found]


def test_the_options_of_ddp_are_those_of_distributed_data_parallel() -> None:
    ours = {*_torch_refusals.DDP, *NOT_THE_RECIPES}
    assert ours >= set(inspect.signature(DistributedDataParallel).parameters)


def test_single_refuses_a_second_rank_and_names_what_takes_it() -> None:
    (refusal,) = refusals("single")
    assert refusal == (
        "strategy 'single' trains in one process, but 2 ranks were asked for; use --nproc 1, or --strategy ddp or fsdp2"
    )


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_an_unknown_option_is_refused_with_the_nearest_known_one(strategy: str) -> None:
    (refusal,) = refusals(strategy, nproc=1, compil=True)
    assert f"strategy '{strategy}' has no option 'compil', did you mean 'compile'?" in refusal


@pytest.mark.parametrize("size", [0, 3, "two"])
def test_fsdp2_refuses_shard_groups_that_do_not_divide_the_ranks(size: object) -> None:
    (refusal,) = refusals("fsdp2", nproc=4, shard_size=size)
    assert f"shard_size is {size!r}, which does not divide 4 ranks into groups; use a divisor" in refusal


def test_fsdp2_refuses_an_unknown_dtype() -> None:
    (refusal,) = refusals("fsdp2", param_dtype="int8")
    assert refusal == "strategy.options.param_dtype is 'int8'; use one of fp32, bf16, fp16"


def test_refusals_of_the_built_in_strategies_import_no_framework() -> None:
    code = (
        "import sys; from unitrain import registry\n"
        "for entry in registry.STRATEGIES.values(): registry.resolve(entry.problems)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
