"""What only a GPU can show: NCCL, fused kernels on the device, bf16, and a loop that never waits for the device."""

from __future__ import annotations

import pytest
import torch

from unitrain.batch import Batch, MicroBatch
from unitrain.recipe import OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategies.single import Single
from unitrain.strategy import HyperParameters, Role
from unitrain.testing import StrategyContract
from unitrain.testing.toy import ToySource, initial_value
from unitrain.testing.toy_torch import ToyModel, toy_loss
from unitrain.world import World

NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="needs a CUDA device, and torch sees none"),
]
ONE_AND_ALL = tuple(sorted({1, min(NUM_GPUS, 4)} - {0}))


class TestSingleOnCuda(StrategyContract):
    strategy = "single"
    ranks = (1,)
    accelerator = True


class TestDDPOnCuda(StrategyContract):
    strategy = "ddp"
    ranks = ONE_AND_ALL
    accelerator = True


class TestFSDP2OnCuda(StrategyContract):
    strategy = "fsdp2"
    ranks = ONE_AND_ALL
    accelerator = True


class TestFSDP2OffloadedToTheHost(StrategyContract):
    strategy = "fsdp2"
    options = {"cpu_offload": True}
    ranks = ONE_AND_ALL
    accelerator = True


def _bound(precision: str) -> tuple[Single, object]:
    optimizer = OptimizerRecipe(lr=1e-2, clip=0.5)
    recipe = Recipe(
        trainer="tests:none",
        optimizer=optimizer,
        train=TrainRecipe(global_batch=8, precision=precision),
        strategy=StrategyRecipe(name="single"),
    )
    strategy = Single(recipe)
    strategy.open(World())
    role = Role(model=ToyModel, losses={"loss": toy_loss}, optimizer=optimizer, initial=initial_value)
    return strategy, strategy.bind(role, 0)


def _batch(strategy: Single, step: int) -> Batch:
    source = ToySource()
    ids = torch.arange(8 * step, 8 * step + 8).remainder(len(source)).numpy()
    micro = MicroBatch(strategy.place(source.fetch(ids)), 8, step)
    return Batch(step, ids, lambda: [micro])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_does_not_wait_for_the_device(precision: str) -> None:
    strategy, engine = _bound(precision)
    batches = [_batch(strategy, step) for step in range(4)]
    engine.update(batches[0], HyperParameters(1e-2, 0.5)).read()  # allocations and kernels of the first step
    torch.cuda.set_sync_debug_mode("error")
    try:
        outs = [engine.update(batch, HyperParameters(1e-2, 0.5)) for batch in batches[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(out.read()["loss"] > 0 for out in outs)


def test_bf16_stays_near_fp32() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        strategy, engine = _bound(precision)
        outs = [engine.update(_batch(strategy, step), HyperParameters(1e-2, 0.5)) for step in range(20)]
        losses[precision] = [out.read()["loss"] for out in outs]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
