"""What a run is: frozen dataclasses, the schema of a recipe file and the only form that code sees.

`unitrain.recipe_file` reads YAML into these; this module knows no file format. Each field carries the sentence
that the reference prints (`help`), and each class checks its own values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .errors import RecipeError

PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
OPTIMIZERS = ("adamw", "sgd")


def key(default: Any, help: str, *, name: str | None = None) -> Any:
    """A field with its help; `name` is its key in YAML where Python cannot spell it."""
    return field(default=default, metadata={"help": help, "key": name})


def mapping(help: str) -> Any:
    """A field for free keys, empty unless given."""
    return field(default_factory=lambda: MappingProxyType({}), metadata={"help": help, "key": None})


def section(kind: type, help: str) -> Any:
    """A nested group of keys, at its defaults unless given."""
    return field(default_factory=kind, metadata={"help": help, "key": None})


def required(help: str) -> Any:
    """A field that the recipe must give."""
    return field(metadata={"help": help, "key": None})


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The model by name, with options of its own."""

    name: str = key("", "a built-in model (`gpt`, `mlp`, `convnet`, `hf`), or any word that your Trainer understands")
    options: Mapping[str, Any] = mapping("all other keys under `model:`; the model's own")


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """The data source by name, with options of its own."""

    name: str = key("", "a built-in source (`text`, `tokens`, `arrays`, `digits`, `datasets`), or your Trainer's own")
    options: Mapping[str, Any] = mapping("all other keys under `data:`; the source's own")


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """The optimizer; the same mathematics on every strategy."""

    name: str = key("adamw", "`adamw` (torch's definition) or `sgd`")
    lr: float = key(1e-3, "learning rate at the top of the schedule")
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's decay rates of the first and second moment")
    eps: float = key(1e-8, "AdamW's term outside the square root")
    momentum: float = key(0.0, "SGD's momentum")
    weight_decay: float = key(0.0, "decoupled for AdamW, added to the gradient for SGD, as in torch")
    decay: str = key(
        "all", "which parameters decay: `all`, or `matrices` (two or more dimensions: no norms, no biases)"
    )
    clip: float | None = key(None, "largest global L2 norm of the gradient; null: no clipping")

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, OPTIMIZERS)
        one_of("optimizer.decay", self.decay, ("all", "matrices"))
        at_least("optimizer.lr", self.lr, 0)
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        above("optimizer.eps", self.eps, 0)
        if self.clip is not None:
            above("optimizer.clip", self.clip, 0)
        for number, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                raise RecipeError(f"optimizer.betas[{number}] is {beta}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ScheduleRecipe:
    """The learning rate as a pure function of the step."""

    name: str = key("constant", "`constant`, `linear`, `cosine` or `wsd` (warm up, stay, decay)")
    warmup_steps: int = key(0, "steps of linear rise from 0 to `optimizer.lr`")
    decay_steps: int | None = key(None, "steps of the decay; null: to the end (`wsd`: the last tenth)")
    final: float = key(0.0, "learning rate at the end, as a share of `optimizer.lr`")

    def __post_init__(self) -> None:
        one_of("schedule.name", self.name, SCHEDULES)
        at_least("schedule.warmup_steps", self.warmup_steps, 0)
        if self.decay_steps is not None:
            at_least("schedule.decay_steps", self.decay_steps, 1)
        if not 0 <= self.final <= 1:
            raise RecipeError(f"schedule.final is {self.final}; it is a share of optimizer.lr, from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """How long, how wide, how precise."""

    steps: int = key(100, "optimizer steps of the whole run")
    global_batch: int = key(32, "samples of one optimizer step over all ranks; never changes with the number of ranks")
    micro_batch: int | None = key(None, "most rows of one forward pass on one rank; null: all rows that the rank holds")
    precision: str = key("fp32", "`fp32`, `bf16` or `fp16` compute; parameters and moments stay fp32")
    seed: int = key(0, "of the initial weights, the sample order and the random keys")
    log_every: int = key(10, "steps between lines of metrics.jsonl")
    eval_every: int | None = key(None, "steps between evaluations; null: only at the end; 0: never")
    eval_batches: int | None = key(None, "global batches of one evaluation; null: the whole split")

    def __post_init__(self) -> None:
        one_of("train.precision", self.precision, PRECISIONS)
        at_least("train.steps", self.steps, 0)
        at_least("train.global_batch", self.global_batch, 1)
        at_least("train.log_every", self.log_every, 1)
        at_least("train.seed", self.seed, 0)
        if self.micro_batch is not None:
            at_least("train.micro_batch", self.micro_batch, 1)
        if self.eval_every is not None:
            at_least("train.eval_every", self.eval_every, 0)
        if self.eval_batches is not None:
            at_least("train.eval_batches", self.eval_batches, 1)


@dataclass(frozen=True, kw_only=True)
class StrategyRecipe:
    """On which backend."""

    name: str = key("ddp", "see `unitrain list strategies`")
    options: Mapping[str, Any] = mapping("the backend's own options, passed through untouched")


@dataclass(frozen=True, kw_only=True)
class LauncherRecipe:
    """How processes start."""

    name: str = key("local", "see `unitrain list launchers`")
    nodes: int = key(1, "machines")
    nproc: int = key(1, "ranks on each machine")
    options: Mapping[str, Any] = mapping("the launcher's own options")

    def __post_init__(self) -> None:
        at_least("launcher.nodes", self.nodes, 1)
        at_least("launcher.nproc", self.nproc, 1)


@dataclass(frozen=True, kw_only=True)
class CodeRecipe:
    """Whose code the ranks run."""

    snapshot: bool = key(
        False,
        "true: a copy of the project's tracked and changed files, made at the launch and kept in the run's folder; "
        "false: the files as they are when ranks start",
    )
    allow: tuple[str, ...] = key((), "patterns of files that go along though they look like secrets or are large")
    leave_out: tuple[str, ...] = key((), "patterns of files that ranks do not need")
    link: tuple[str, ...] = key((), "folders or files that the copy only links to: data")
    file_mb: float = key(10.0, "a larger file is refused by name (MiB)")
    total_mb: float = key(200.0, "a larger copy is refused (MiB)")

    def __post_init__(self) -> None:
        above("code.file_mb", self.file_mb, 0)
        above("code.total_mb", self.total_mb, 0)
        for name, patterns in (("allow", self.allow), ("leave_out", self.leave_out), ("link", self.link)):
            for pattern in patterns:
                if pattern in ("", ".") or pattern.startswith("/") or ".." in pattern.split("/"):
                    raise RecipeError(f"code.{name} has {pattern!r}; paths start at the top of the project")


@dataclass(frozen=True, kw_only=True)
class CheckpointRecipe:
    """When to save, and what to keep."""

    every: int | None = key(None, "steps between checkpoints; null: only at the end; 0: never")
    keep: int = key(3, "newest checkpoints to keep")
    asynchronous: bool = key(True, "write behind the training; the step waits only for a copy", name="async")
    memory_every: int | None = key(
        None,
        "steps between snapshots in memory that outlive a killed rank; not with `torchrun` and `mpi`; null: none",
    )
    path: str | None = key(None, "any fsspec URL; null: `checkpoints` in the run's folder")

    def __post_init__(self) -> None:
        at_least("checkpoint.keep", self.keep, 1)
        if self.every is not None:
            at_least("checkpoint.every", self.every, 0)
        if self.memory_every is not None:
            at_least("checkpoint.memory_every", self.memory_every, 1)


@dataclass(frozen=True, kw_only=True)
class RecoveryRecipe:
    """What the agent does about ranks that die or hang."""

    restarts: int = key(
        3,
        "failed attempts in a row without a newer checkpoint after which the run ends, with exit code 93; any newer "
        "checkpoint starts the count anew; 0: never restart",
    )
    hang_seconds: float | None = key(
        None, "time without progress in a step after which a rank counts as hung; null: from the run's own step times"
    )

    def __post_init__(self) -> None:
        at_least("recovery.restarts", self.restarts, 0)
        if self.hang_seconds is not None:
            above("recovery.hang_seconds", self.hang_seconds, 0)


@dataclass(frozen=True, kw_only=True)
class GuardRecipe:
    """When training itself goes wrong."""

    max_skips: int = key(25, "updates in a row lost to gradients that are not finite after which the run ends")
    spike: float | None = key(
        None,
        "a loss above median + this x MAD (median absolute deviation) of the last losses rolls back to the newest "
        "checkpoint and skips the samples of those steps; 10 is a start; null: never",
    )
    window: int = key(64, "losses that `guard.spike` compares with; it judges once there are 16, or as many as these")
    max_rollbacks: int = key(3, "rollbacks of a run; the next spike ends it")
    digest_every: int = key(
        0, "steps between comparisons of the weights that ranks hold as replicas, also before each save; 0: never"
    )

    def __post_init__(self) -> None:
        at_least("guard.max_skips", self.max_skips, 1)
        at_least("guard.window", self.window, 4)
        at_least("guard.max_rollbacks", self.max_rollbacks, 0)
        at_least("guard.digest_every", self.digest_every, 0)
        if self.spike is not None:
            above("guard.spike", self.spike, 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that defines a run."""

    name: str = key("run", "start of the run's id")
    trainer: str = required("`module:Class` or `path/to/file.py:Class`, a subclass of unitrain.Trainer")
    model: ModelRecipe = section(ModelRecipe, "what is trained")
    data: DataRecipe = section(DataRecipe, "on what")
    optimizer: OptimizerRecipe = section(OptimizerRecipe, "how parameters move")
    schedule: ScheduleRecipe = section(ScheduleRecipe, "the learning rate over the run")
    train: TrainRecipe = section(TrainRecipe, "how long, how wide, how precise")
    strategy: StrategyRecipe = section(StrategyRecipe, "on which backend")
    launcher: LauncherRecipe = section(LauncherRecipe, "how processes start")
    code: CodeRecipe = section(CodeRecipe, "whose code the ranks run")
    checkpoint: CheckpointRecipe = section(CheckpointRecipe, "when to save, and what to keep")
    recovery: RecoveryRecipe = section(RecoveryRecipe, "what happens when ranks die or hang")
    guard: GuardRecipe = section(GuardRecipe, "what happens when training itself goes wrong")
    rl: Mapping[str, Any] = mapping("keys of the trainers of unitrain.rl, which check them; see docs/rl.md")

    def __post_init__(self) -> None:
        # A run id becomes folder, job and pod names: letters, digits, dot, dash and underscore only.
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,63}", self.name):
            raise RecipeError(f"name is {self.name!r}; use at most 63 letters, digits, '.', '_' and '-'")
        if not self.name[0].isalnum():
            raise RecipeError(f"name is {self.name!r}; it must start with a letter or a digit")
        if self.guard.spike is not None and self.checkpoint.every == 0:
            raise RecipeError("guard.spike rolls back to a checkpoint, and checkpoint.every is 0; set it, or to null")
        if ":" not in self.trainer:
            raise RecipeError(f"trainer is {self.trainer!r}; write module:Class or path/to/file.py:Class")

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other values: `recipe.replace(train=...)`."""
        return dataclasses.replace(self, **changes)


def one_of(where: str, value: str, known: tuple[str, ...]) -> None:
    """Raise RecipeError unless the value is a known word."""
    if value not in known:
        raise RecipeError(f"{where} is {value!r}; it must be one of {', '.join(known)}")


def at_least(where: str, value: float, least: float) -> None:
    """Raise RecipeError for a value below the least (a NaN is below everything)."""
    if not value >= least:
        raise RecipeError(f"{where} is {value}; it must be at least {least}")


def above(where: str, value: float, bound: float) -> None:
    """Raise RecipeError unless the value is above the bound."""
    if not value > bound:
        raise RecipeError(f"{where} is {value}; it must be above {bound}")
