"""The training loops that are compared: the same model, loss, data order and first weights, each in its own way.

Every loop takes ready tensors from the same kind of feed, so that none pays for data and none gains by it.
"""

from __future__ import annotations

import importlib.util
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from unitrain import Trainer, World
from unitrain.data.arrays import ArraySource
from unitrain.data.feed import Feed
from unitrain.data.source import Source
from unitrain.models.config import GPT, MLP
from unitrain.models.gpt_torch import GPTModule
from unitrain.models.mlp_torch import MLPModule
from unitrain.recipe import CheckpointRecipe, OptimizerRecipe, Recipe, StrategyRecipe, TrainRecipe

SEED, LR, BETAS, CLIP = 0, 1e-3, (0.9, 0.999), 1.0
ENDLESS = 10**9  # steps; a loop is left before it comes to its last, which is logged and saved


@dataclass(frozen=True)
class Work:
    """What is trained. Rows are powers of two, so that a sum of losses and their mean differ by an exact factor."""

    global_batch: int
    model: Callable[[], nn.Module]
    source: Callable[[], Source]


def _mlp() -> nn.Module:
    return MLPModule(MLP(in_features=64, hidden=(64,), num_classes=64))


def _labelled() -> Source:
    draw = np.random.default_rng(SEED)
    # Large inputs make large gradients: clipping is active.
    x = (4 * draw.standard_normal((512, 64))).astype(np.float32)
    return ArraySource(x=x, y=draw.integers(0, 64, 512))


def _gpt() -> nn.Module:
    return GPTModule(GPT(layers=4, width=128, heads=4, ffn=512, vocab_size=256, max_len=64))


def _tokens() -> Source:
    tokens = np.random.default_rng(SEED).integers(0, 256, (256, 65))
    return ArraySource(x=tokens[:, :-1].copy(), y=tokens[:, 1:].copy())


WORKS: Mapping[str, Work] = {
    "tiny": Work(global_batch=8, model=_mlp, source=_labelled),  # 64-64-64
    "small": Work(global_batch=4, model=_gpt, source=_tokens),  # 4 layers, width 128, 64 tokens
}


def loss_function(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy, the mean over the rows of the batch: the scalar that most training code has."""
    return nn.functional.cross_entropy(model(batch["x"]).flatten(0, -2), batch["y"].flatten())


class Loop(ABC):
    """A training loop that can be run some steps at a time."""

    @abstractmethod
    def advance(self, steps: int, losses: list[Tensor] | None = None) -> None:
        """Go on by so many steps; with `losses`, note each step's mean loss as this rank knows it."""

    @abstractmethod
    def params(self) -> list[Tensor]:
        """The trained parameters, as this rank holds them."""

    def global_losses(self, losses: list[Tensor]) -> list[float]:
        """The noted losses as means over the global batch. A collective."""
        table = torch.stack(losses)
        if dist.is_initialized():
            dist.all_reduce(table)
            table /= dist.get_world_size()
        return table.tolist()

    def close(self) -> None:
        """Give up what the loop holds."""
        return


class Ours(Loop):
    """A Trainer's own loop: `fit` does nothing but exhaust `steps`."""

    def __init__(self, work: Work, strategy: str, world: World, folder: Path) -> None:
        class Benchmark(Trainer):
            def build_model(self) -> nn.Module:
                return work.model()

            def build_source(self, split: str) -> Source | None:
                return work.source() if split == "train" else None

            def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
                return loss_function(model, batch)

        recipe = Recipe(
            trainer="loops:Ours",
            optimizer=OptimizerRecipe(lr=LR, betas=BETAS, clip=CLIP),
            train=TrainRecipe(
                steps=ENDLESS, global_batch=work.global_batch, seed=SEED, log_every=ENDLESS, eval_every=0
            ),
            strategy=StrategyRecipe(name=strategy),
            checkpoint=CheckpointRecipe(every=0),
        )
        self.trainer = Benchmark(recipe, run_dir=folder, world=world)
        self.steps: Any = self.trainer.steps()  # a generator: closing it ends the run
        # Its first step opens the process group, which the other loops share.
        self.first_loss = next(self.steps).loss.clone()

    def advance(self, steps: int, losses: list[Tensor] | None = None) -> None:
        if losses is not None and self.trainer.cursor.step == 1:
            losses.append(self.first_loss)
            steps -= 1
        for out in itertools.islice(self.steps, steps):
            if losses is not None:
                losses.append(out.loss)

    def params(self) -> list[Tensor]:
        return [_local(param) for param in self.trainer.engines["model"].model.parameters()]

    def global_losses(self, losses: list[Tensor]) -> list[float]:
        return torch.stack(losses).tolist()  # a StepOut's loss is global already

    def close(self) -> None:
        self.steps.close()


class _WithFeed(Loop):
    """What the loops other than ours have in common: they take their batches themselves."""

    def __init__(self, work: Work, world: World) -> None:
        self.feed = Feed(
            work.source(),
            seed=SEED,
            global_batch=work.global_batch,
            micro_batch=None,
            rank=world.rank,
            size=world.size,
            place=lambda arrays: {name: torch.from_numpy(array) for name, array in arrays.items()},
        )
        self.step = 0
        torch.manual_seed(SEED)
        self.model: Any = work.model()

    def params(self) -> list[Tensor]:
        return [_local(param) for param in self.model.parameters()]

    def close(self) -> None:
        self.feed.close()


class ByHand(_WithFeed):
    """What somebody writes who knows torch well and wants it fast."""

    def __init__(self, work: Work, strategy: str, world: World) -> None:
        super().__init__(work, world)
        if strategy == "ddp":
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        if strategy == "fsdp2":
            for unit in self.model.sharding_units():
                fully_shard(unit)
            fully_shard(self.model)
        self.trained = list(self.model.parameters())  # once: walking the modules costs calls in every step
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
        self.clip: Callable[[list[Any], float], Any] = clip_shards if strategy == "fsdp2" else clip_grad_norm_

    def advance(self, steps: int, losses: list[Tensor] | None = None) -> None:
        for step in range(self.step, self.step + steps):
            batch = self.feed.batch(step).micro()[0].arrays
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_function(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            self.clip(self.trained, CLIP)
            self.optimizer.step()
            if losses is not None:
                losses.append(loss.detach())
        self.step += steps


class WithFabric(_WithFeed):
    """Lightning Fabric, with DDP's options as by hand and without its check for a non-finite norm, a host sync."""

    def __init__(self, work: Work, strategy: str, world: World) -> None:
        super().__init__(work, world)
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import DDPStrategy  # type: ignore[attr-defined]  # not in its __all__

        chosen: Any = DDPStrategy(gradient_as_bucket_view=True) if strategy == "ddp" else "auto"
        self.fabric = Fabric(accelerator="cpu", devices=world.size, strategy=chosen)
        self.fabric.launch()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
        self.model, self.optimizer = self.fabric.setup(self.model, optimizer)
        assert self.fabric.world_size == world.size

    def advance(self, steps: int, losses: list[Tensor] | None = None) -> None:
        for step in range(self.step, self.step + steps):
            batch = self.feed.batch(step).micro()[0].arrays
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_function(self.model, batch)
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=CLIP, error_if_nonfinite=False)
            self.optimizer.step()
            if losses is not None:
                losses.append(loss.detach())
        self.step += steps


class WithAccelerate(_WithFeed):
    """Accelerate, with DDP's options as by hand."""

    def __init__(self, work: Work, strategy: str, world: World) -> None:
        super().__init__(work, world)
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        options = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.accelerator = Accelerator(cpu=True, kwargs_handlers=[options])
        assert self.accelerator.num_processes == world.size
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.trained = list(self.model.parameters())

    def advance(self, steps: int, losses: list[Tensor] | None = None) -> None:
        for step in range(self.step, self.step + steps):
            batch = self.feed.batch(step).micro()[0].arrays
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_function(self.model, batch)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.trained, CLIP)
            self.optimizer.step()
            if losses is not None:
                losses.append(loss.detach())
        self.step += steps


# name -> (loop, package that must be installed, strategies that it can do on CPU)
PEERS: Mapping[str, tuple[type[Any], str, tuple[str, ...]]] = {
    "fabric": (WithFabric, "lightning", ("single", "ddp")),
    "accelerate": (WithAccelerate, "accelerate", ("single", "ddp")),
}


def make_loops(size: str, strategy: str, world: World, folder: Path, *, peers: bool) -> dict[str, Loop]:
    """Every loop that can run here, by name, none of them having gone further than its first step."""
    work = WORKS[size]
    loops: dict[str, Loop] = {"unitrain": Ours(work, strategy, world, folder), "by hand": ByHand(work, strategy, world)}
    for name, (kind, package, strategies) in PEERS.items():
        if peers and strategy in strategies and importlib.util.find_spec(package) is not None:
            loops[name] = kind(work, strategy, world)
    return loops


@torch.no_grad()
def clip_shards(params: list[Any], most: float) -> None:
    """`clip_grad_norm_` for FSDP2 without the detour over DTensor, which costs more calls than it saves lines.

    It adds the squares of a rank before those of the ranks; `clip_grad_norm_` adds per parameter first, so that its
    last bits differ.
    """
    grads = [param.grad.to_local() for param in params]
    square = get_total_norm(grads).square()
    dist.all_reduce(square)
    torch._foreach_mul_(grads, (most / (square.sqrt() + 1e-6)).clamp_(max=1.0))


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()
