"""DeepSpeed's engine in one process: what the contract's scenario does not meet. The reference is `single`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import unitrain
from unitrain import registry
from unitrain.batch import Batch, MicroBatch
from unitrain.build import deepspeed as operators
from unitrain.errors import CheckpointMismatch, Refused
from unitrain.recipe import OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategy import Engine, HyperParameters, Role, Shard, TensorInfo
from unitrain.world import World

pytest.importorskip("deepspeed")

ADAMW = OptimizerRecipe(lr=1e-2, weight_decay=0.1, decay="matrices", clip=0.5)
NARROW, WIDE = (6, 5), (700, 900)  # NVMe takes tensors of a megabyte


class TwoHeads(nn.Module):
    """A trunk that both losses use, a head that one uses, and a parameter that nobody trains."""

    def __init__(self, sizes: tuple[int, int] = NARROW) -> None:
        super().__init__()
        inputs, hidden = sizes
        self.trunk, self.head = nn.Linear(inputs, hidden), nn.Linear(hidden, inputs)
        self.fixed = nn.Parameter(torch.ones(3, 2), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1))

    def inner(self, x: Tensor) -> Tensor:
        """Not `forward`, and with a parameter of the model's own."""
        return torch.tanh(self.trunk(x)) * self.scale * self.fixed.mean()

    def forward(self, x: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, inputs)."""
        found: Tensor = self.head(self.inner(x))
        return found


class Scalar(nn.Module):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


def whole(model: TwoHeads, batch: Mapping[str, Tensor]) -> unitrain.Loss:
    error = (model(batch["x"]) - batch["x"].roll(1)).square().sum(dim=1)
    return unitrain.Loss((error * batch["weight"]).sum(), batch["weight"].sum())


def trunk_only(model: TwoHeads, batch: Mapping[str, Tensor]) -> unitrain.Loss:
    return unitrain.Loss(model.inner(batch["x"]).square().sum(), len(batch["x"]))


def initial(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    draws = np.random.default_rng([seed, *name.encode()])
    return np.asarray(0.3 + 0.02 * draws.standard_normal(shape), dtype=np.float32)


def batch(step: int, *, inputs: int = 6, weight: float = 1.0) -> Batch:
    """Two micro-batches of three rows."""

    def load() -> list[MicroBatch]:
        draws = np.random.default_rng(step)
        rows = [draws.standard_normal((3, inputs)).astype(np.float32) for _ in range(2)]
        return [
            MicroBatch({"x": torch.from_numpy(x), "weight": torch.full((3,), weight)}, 3, 10 * step + number)
            for number, x in enumerate(rows)
        ]

    return Batch(step, np.arange(6), load)


class Kept:
    """A checkpoint in memory."""

    def __init__(self, shards: Iterator[Shard]) -> None:
        self.tensors: dict[tuple[str, str], TensorInfo] = {}
        self.arrays: dict[tuple[str, str], Any] = {}
        for shard in shards:
            pair = (shard.kind, shard.name)
            self.tensors[pair] = TensorInfo(shard.dtype, shard.shape)
            array = self.arrays.setdefault(pair, np.zeros(shard.shape, shard.data.dtype))
            array[_slices(shard.offset, shard.data.shape)] = shard.data

    def read(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[Any]:
        """See ShardReader."""
        return np.array(self.arrays[kind, name][_slices(offset, shape)])


def _slices(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))


class Bench:
    """Strategies opened one after the other in this process, and closed at the end of a test."""

    def __init__(self) -> None:
        self.opened: list[Any] = []

    def bind(
        self,
        name: str,
        *,
        precision: str = "fp32",
        sizes: tuple[int, int] = NARROW,
        optimizer: Any = ADAMW,
        seed: int = 0,
        born: bool = True,
        **options: Any,
    ) -> Any:
        """A fresh engine of a strategy that is not open yet."""
        self.close()
        recipe = Recipe(
            trainer="a:b",
            optimizer=ADAMW,
            train=TrainRecipe(precision=precision),
            strategy=StrategyRecipe(name=name, options=options),
        )
        strategy = registry.load("strategies", name)(recipe)
        self.opened.append(strategy)
        strategy.open(World())
        return self.again(sizes=sizes, optimizer=optimizer, seed=seed, born=born)

    def again(
        self, *, sizes: tuple[int, int] = NARROW, optimizer: Any = ADAMW, seed: int = 0, born: bool = True
    ) -> Any:
        """One more engine of the same strategy."""
        losses = {"loss": whole, "trunk": trunk_only}
        role = Role(
            model=lambda: TwoHeads(sizes), losses=losses, optimizer=optimizer, initial=initial if born else None
        )
        return self.opened[-1].bind(role, seed)

    def close(self) -> None:
        while self.opened:
            self.opened.pop().close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def train(engine: Engine, steps: int, **how: Any) -> list[dict[str, float]]:
    return [engine.update(batch(step, **how), HyperParameters(1e-2, 0.5)).read() for step in range(steps)]


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_matrices_alone_decay_and_untrained_parameters_are_kept(bench: Bench, strategy: str) -> None:
    alone = bench.bind("single")
    expected, state = train(alone, 3), Kept(alone.shards())
    zero = bench.bind(strategy)
    found, here = train(zero, 3), Kept(zero.shards())
    assert [out["loss"] for out in found] == pytest.approx([out["loss"] for out in expected], rel=1e-5)
    assert sorted(here.arrays) == sorted(state.arrays)
    for pair, value in state.arrays.items():
        np.testing.assert_allclose(here.arrays[pair], value, rtol=1e-4, atol=1e-6, err_msg=str(pair))


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_sgd_with_momentum_is_torchs(bench: Bench, strategy: str) -> None:
    sgd = OptimizerRecipe(name="sgd", lr=1e-2, momentum=0.9, weight_decay=0.1)
    expected = train(bench.bind("single", optimizer=sgd), 4)
    zero = bench.bind(strategy, optimizer=sgd)
    found = train(zero, 2)
    kept = Kept(zero.shards())
    assert ("sgd.momentum", "trunk.weight") in kept.arrays
    other = bench.again(optimizer=sgd, seed=1)
    other.load(kept).require_all("the copy")
    found += [other.update(batch(step), HyperParameters(1e-2, 0.5)).read() for step in (2, 3)]
    assert [out["loss"] for out in found] == pytest.approx([out["loss"] for out in expected], rel=1e-5)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_a_batch_of_no_weight_changes_nothing(bench: Bench, strategy: str) -> None:
    zero = bench.bind(strategy)
    train(zero, 2)
    before = Kept(zero.shards())
    out = zero.update(batch(2, weight=0.0), HyperParameters(1e-2, 0.5)).read()
    after = Kept(zero.shards())
    assert out["applied"] == 0
    assert all(after.arrays[pair].tobytes() == value.tobytes() for pair, value in before.arrays.items())
    assert zero.update(batch(3), HyperParameters(1e-2, 0.5)).read()["applied"] == 1


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_a_parameter_without_gradient_is_refused_and_nothing_is_moved(bench: Bench, strategy: str) -> None:
    zero = bench.bind(strategy)
    train(zero, 2)
    before = Kept(zero.shards())
    with pytest.raises(Refused, match=r"'head.weight' got none; .* use --strategy fsdp2 or horovod"):
        zero.update(batch(2), HyperParameters(1e-2, 0.5), "trunk")
    after = Kept(zero.shards())
    assert all(after.arrays[pair].tobytes() == value.tobytes() for pair, value in before.arrays.items())


@pytest.mark.parametrize("born", [True, False], ids=["born sharded", "built whole"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_masters_in_bf16_runs_begin_as_exact_as_in_fp32(bench: Bench, strategy: str, born: bool) -> None:
    digest = bench.bind("single", born=born).digest()
    zero = bench.bind(strategy, precision="bf16", born=born)
    found = zero.digest()
    assert {name: found[name] for name in digest if name != "fixed"} == {
        name: value for name, value in digest.items() if name != "fixed"
    }
    train(zero, 2)
    kept = Kept(zero.shards())
    assert {info.dtype for (kind, name), info in kept.tensors.items() if name != "fixed"} == {"float32"}
    other = bench.again(seed=1)
    other.load(kept).require_all("the copy")
    assert other.digest() == zero.digest()
    assert train(other, 2) == train(zero, 2)


def test_a_non_finite_gradient_in_bf16_is_skipped_too(bench: Bench) -> None:
    for strategy in ("zero1", "zero2", "zero3"):
        zero = bench.bind(strategy, precision="bf16")
        train(zero, 1)
        before = zero.digest()
        assert zero.update(batch(1, weight=float("inf")), HyperParameters(1e-2, 0.5)).read()["applied"] == 0
        assert zero.digest() == before


def test_frozen_roles_are_evaluated_and_never_updated(bench: Bench) -> None:
    expected = bench.bind("single", optimizer=None)
    loss = expected.evaluate([batch(0)])["loss"]
    for strategy in ("zero2", "zero3"):
        frozen = bench.bind(strategy, optimizer=None)
        assert frozen.evaluate([batch(0)])["loss"] == pytest.approx(loss, rel=1e-5)
        assert frozen.digest() == expected.digest()
        kept = Kept(frozen.shards())
        other = bench.again(optimizer=None, seed=1)
        assert other.digest() != frozen.digest()
        other.load(kept).require_all("the copy")
        assert other.digest() == frozen.digest()
        with pytest.raises(unitrain.UnitrainError, match="this role has no optimizer"):
            frozen.update(batch(0), HyperParameters(1e-2))


def test_one_count_for_parameters_that_were_updated_unequally_is_refused(bench: Bench) -> None:
    kept = Kept(bench.bind("single").shards())
    kept.arrays["adamw.step", "trunk.weight"] = np.float32(3)
    kept.arrays["adamw.step", "head.weight"] = np.float32(4)
    zero = bench.bind("zero2")
    with pytest.raises(CheckpointMismatch, match="keeps one count for both; resume with --strategy ddp"):
        zero.load(kept)


def test_what_deepspeed_cannot_do_is_refused(bench: Bench) -> None:
    with pytest.raises(Refused, match=r"use train\.precision: bf16 or fp32"):
        bench.bind("zero2", precision="fp16")
    bench.bind("zero2")
    with pytest.raises(Refused, match=r"scalar parameter 'weight'; give it the shape \(1,\)"):
        bench.opened[-1].bind(Role(model=Scalar, optimizer=ADAMW), 0)
    with pytest.raises(Refused, match="use the recipe's optimizer"):
        bench.bind("zero2", optimizer=lambda params: torch.optim.RMSprop(params))


@pytest.mark.skipif(not operators.is_built("async_io"), reason="needs: python -m unitrain.build deepspeed")
def test_nvme_holds_what_memory_would_and_changes_no_bit(bench: Bench, tmp_path: Path) -> None:
    inputs = WIDE[0]
    in_memory = bench.bind("zero3_offload", sizes=WIDE)
    expected, digest = train(in_memory, 3, inputs=inputs), in_memory.digest()
    groups = {"sub_group_size": 300_000}
    on_nvme = bench.bind("zero3_offload", sizes=WIDE, offload="nvme", nvme_path=str(tmp_path), zero_optimization=groups)
    assert train(on_nvme, 3, inputs=inputs) == expected
    assert on_nvme.digest() == digest
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.swp")) > 3 * 4 * WIDE[0] * WIDE[1]
    kept = Kept(on_nvme.shards())
    other = bench.again(sizes=WIDE, seed=1)
    other.load(kept).require_all("the copy")
    assert other.digest() == digest
    assert train(other, 2, inputs=inputs) == train(on_nvme, 2, inputs=inputs)
    bench.close()
    assert list(tmp_path.iterdir()) == []
