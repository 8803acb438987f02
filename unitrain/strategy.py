"""The contract of a backend: a Strategy opens it, an Engine is one model and optimizer bound to it.

The unit of work is one optimizer step over the global batch. Accumulation, gradient sync, clipping, the finite
check and the update are all inside `Engine.update`, so that one definition holds for every backend:

    g      = gradient of (sum of loss sums) / (sum of weights) over the whole global batch
    n      = global L2 norm of g in fp32;  g *= min(1, clip / (n + 1e-6))
    a non-finite n skips the update on every rank together
    AdamW  : p *= 1 - lr * weight_decay;  p -= lr * m_hat / (sqrt(v_hat) + eps)   (torch's definition)
"""

from __future__ import annotations

import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .batch import Batch
from .errors import CheckpointMismatch
from .recipe import OptimizerRecipe, Recipe
from .world import World

Metrics = dict[str, tuple[float, float]]  # name -> (sum, weight), over all ranks


class Loss(NamedTuple):
    """A loss as a sum and the weight it is a sum over (tokens, rows, ...), scalars of the backend's framework.

    The gradient applied is that of (sum of sums) / (sum of weights) over the whole global batch. `metrics` holds
    further (sum, weight) pairs to report, such as correct predictions.
    """

    sum: Any
    weight: Any
    metrics: Mapping[str, tuple[Any, Any]] = {}


LossFunction = Callable[[Any, Mapping[str, Any]], Any]  # (model, batch) -> Loss | scalar mean over my rows


class HyperParameters(NamedTuple):
    """What may change from step to step."""

    lr: float
    clip: float | None = None


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model of a run, its losses, and what updates it."""

    model: Callable[[], Any]
    losses: Mapping[str, LossFunction] = field(default_factory=dict)
    # None: frozen. A callable takes the trainable parameters and returns an optimizer of the framework.
    optimizer: OptimizerRecipe | Callable[[list[Any]], Any] | None = None
    # (canonical name, shape, seed) -> fp32 values; with it a model is born sharded, without it `model` initialises
    initial: Callable[[str, tuple[int, ...], int], NDArray[np.float32]] | None = None
    strategy: str | None = None  # None: the recipe's
    name: str = ""  # its key in Trainer.roles(), which the Trainer fills in
    # "trainable": checkpoints leave out frozen parameters, which `initial` gives again when a run is resumed
    checkpoint: Literal["all", "trainable"] = "all"


class Shard(NamedTuple):
    """A box of a named logical tensor, as one rank holds it.

    `data` is C-contiguous and may alias live memory: copy it before the next update. numpy has no bfloat16, so
    its bits travel as uint16.
    """

    name: str  # canonical: given by the model's definition, never by a wrapper
    kind: str  # param, buffer, adamw.m, adamw.v, adamw.step, ...
    dtype: str  # float32, bfloat16, int64, ...
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # of this box in it
    data: NDArray[Any]


class TensorInfo(NamedTuple):
    """What a checkpoint knows of one tensor without reading it."""

    dtype: str
    shape: tuple[int, ...]


class ShardReader(Protocol):
    """Reads any box of any tensor of a checkpoint, whoever wrote it."""

    @property
    def tensors(self) -> Mapping[tuple[str, str], TensorInfo]:
        """(kind, canonical name) -> dtype and global shape."""

    def read(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[Any]:
        """The box of that shape at that offset. Raises CheckpointDamaged where bytes differ from the manifest."""


class LoadReport(NamedTuple):
    """(kind, name) pairs: loaded, wanted but absent, present but not wanted."""

    loaded: list[tuple[str, str]]
    missing: list[tuple[str, str]]
    unexpected: list[tuple[str, str]]

    def require_all(self, whence: str) -> None:
        """Raise CheckpointMismatch naming what differs, if anything does."""
        if not self.missing and not self.unexpected:
            return
        parts = []
        for verb, pairs in (("lacks", self.missing), ("has no place for", self.unexpected)):
            if pairs:
                names = ", ".join(f"{kind} {name}" for kind, name in pairs[:4])
                more = f" and {len(pairs) - 4} more" if len(pairs) > 4 else ""
                parts.append(f"{'it' if verb == 'lacks' else 'the model'} {verb} {names}{more}")
        raise CheckpointMismatch(f"{whence} does not fit this model: {'; '.join(parts)}")


class StepOut(ABC):
    """What one update gave. Reading a value waits for the device; holding the object does not."""

    @property
    @abstractmethod
    def loss(self) -> Any:
        """Mean loss over the global batch, a scalar on the device."""

    @abstractmethod
    def read(self) -> dict[str, float]:
        """loss, weight, grad_norm, applied (1 or 0) and the loss function's own metrics, over the global batch.

        A collective where the loss function reports metrics: call it on every rank or on none.
        """

    def verdict(self) -> tuple[float, bool]:
        """The loss, and whether the update was applied; `read` without what that costs. May be a collective."""
        values = self.read()
        return values["loss"], bool(values["applied"])


class Problem(NamedTuple):
    """Why a strategy cannot honour a recipe, and what can."""

    what: str
    instead: str


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a recipe would run on, as far as it is known before launch."""

    nodes: int
    nproc: int  # ranks a node

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.nodes * self.nproc


class Report(Protocol):
    """Tells people, and the run's record, of what a strategy has done by itself."""

    def __call__(self, event: str, line: str, **facts: Any) -> None:
        """`event` and its facts are for events.jsonl, the line is for people."""


def _print_line(event: str, line: str, **facts: Any) -> None:
    print(line, flush=True)


class Strategy(ABC):
    """A backend. Entry-point group `unitrain.strategies`; the constructor takes the recipe."""

    name: ClassVar[str]
    framework: ClassVar[str]  # "torch" | "jax" | "tensorflow"
    even: ClassVar[bool] = False  # True: all ranks run one program, on micro-batches of the same sizes
    elsewhere: ClassVar[bool] = False  # True: its ranks are other processes than the Trainer's, and load their own rows

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.report: Report = _print_line  # whoever runs it puts in what keeps a record

    @classmethod
    @abstractmethod
    def problems(cls, recipe: Recipe, cluster: Cluster) -> list[Problem]:
        """Refusals, each with an alternative. Called before launch, without importing the framework."""

    @abstractmethod
    def open(self, world: World) -> None:
        """Join the other ranks: process group, jax.distributed, TF_CONFIG, hvd.init."""

    @abstractmethod
    def bind(self, role: Role, seed: int) -> Engine:
        """Build the role's model, already sharded, and its optimizer. A collective."""

    @abstractmethod
    def place(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        """Host arrays as this framework's arrays on this rank's device. Called from the loading thread."""

    def data_share(self, world: World) -> tuple[int, int]:
        """(index, number): which share of each batch this rank loads, and of how many. Known before `open`."""
        return world.rank, world.size

    def num_ranks(self, world: World) -> int:
        """How many ranks share the work. Known before `open`."""
        return world.size

    @abstractmethod
    def share(self, text: str) -> str:
        """Rank 0's text, on every rank. A collective, for control and not for data."""

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has come here."""

    @abstractmethod
    def close(self) -> None:
        """Leave the other ranks. Safe to call after a failure."""

    def memory_bytes(self) -> int:
        """Most memory that this rank held so far: of its device, or of its process where it has none."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s of this rank's device, where known; for MFU."""
        return None


class Engine(ABC):
    """One model and its optimizer, sharded as the strategy shards."""

    model: Any  # the native model: for `Trainer.loss` of other roles, generation, research

    @abstractmethod
    def update(self, batch: Batch, hp: HyperParameters, loss: str = "loss") -> StepOut:
        """One optimizer step over the global batch, exactly as the module's docstring defines it. A collective."""

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch], loss: str = "loss") -> Metrics:
        """The loss and its metrics over all batches and ranks, without gradients. A collective."""

    @abstractmethod
    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(model, *args)` in evaluation mode without gradients. A collective."""

    @abstractmethod
    def shards(self, kinds: Collection[str] | None = None) -> Iterator[Shard]:
        """This rank's boxes; over all ranks each element of each tensor comes exactly once. A collective."""

    @abstractmethod
    def load(self, reader: ShardReader, kinds: Collection[str] | None = None) -> LoadReport:
        """Fill this rank's boxes from a checkpoint of any strategy and world size."""

    @abstractmethod
    def digest(self) -> dict[str, int]:
        """A 64-bit hash of each parameter and buffer, the same however it is sharded. A collective."""

    def replicas(self) -> dict[str, list[int]]:
        """A 64-bit hash of each tensor that all ranks should hold alike, as each rank holds it, by rank. A collective.

        Empty where ranks hold parts, or where a backend has nothing to compare.
        """
        return {}
