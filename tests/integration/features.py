"""Which features meet which strategies, and what a strategy does that cannot honour one; docs/features.md shows it.

A feature is a small run. On every strategy it must learn what one process learns, or be refused as REFUSED says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from unitrain import registry

# framework -> the module with its models and losses; a framework that is not here is not in the matrix yet
FRAMEWORKS: Mapping[str, str] = MappingProxyType({"torch": "features_torch"})
TIGHT, BAND = 1e-5, 2e-2  # relative, of losses: fp32; bf16 and fp16
ZERO = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A run on two ranks, and on one process."""

    about: str
    trainer: str = "Rows"  # a class of the framework's module
    recipe: tuple[str, ...] = ()  # what differs from the common recipe, as on the command line
    rel: float = TIGHT
    evaluation_rel: float = TIGHT  # where it is not `rel` that holds for evaluations too
    unlike: str = ""  # a feature whose losses it must not have: else it would have no effect
    requires: tuple[str, ...] = ()  # packages


FEATURES: Mapping[str, Feature] = MappingProxyType({
    "accumulation": Feature(about="gradient accumulation over rows of uneven weight"),
    "uneven": Feature(
        about="a global batch that the ranks do not divide, in one pass",
        recipe=("train.global_batch=5", "train.micro_batch=null"),
    ),
    "weightless": Feature(about="micro-batches, ranks and steps whose rows all weigh 0", trainer="Weightless"),
    "scalar-loss": Feature(about="a loss that is a scalar: the mean over its rows", trainer="ScalarLoss"),
    "metrics": Feature(about="metrics of the loss function, some of weight 0", trainer="Metrics"),
    "bf16": Feature(about="`train.precision: bf16`", recipe=("train.precision=bf16",), rel=BAND, unlike="accumulation"),
    "fp16": Feature(
        about="`train.precision: fp16` on CPU", recipe=("train.precision=fp16",), rel=BAND, unlike="accumulation"
    ),
    "sgd": Feature(
        about="`optimizer.name: sgd` with momentum",
        recipe=("optimizer={name: sgd, lr: 1e-2, momentum: 0.9, weight_decay: 0.1, clip: 0.5}",),
        unlike="accumulation",
    ),
    "decay-matrices": Feature(
        about="`optimizer.decay: matrices`", recipe=("optimizer.decay=matrices",), unlike="accumulation"
    ),
    "no-clip": Feature(about="`optimizer.clip: null`", recipe=("optimizer.clip=null",), unlike="accumulation"),
    "schedule": Feature(
        about="a schedule with warmup", recipe=("schedule={name: cosine, warmup_steps: 2}",), unlike="accumulation"
    ),
    "own-optimizer": Feature(
        about="an optimizer of one's own (`Role.optimizer` a callable)", trainer="OwnOptimizer", unlike="accumulation"
    ),
    "frozen": Feature(about="frozen parameters beside trained ones", trainer="Frozen", unlike="accumulation"),
    "scalar": Feature(about="a parameter without dimensions", trainer="Scalar"),
    "tied": Feature(about="weights shared by layers and by blocks", trainer="Tied"),
    "unused": Feature(about="a parameter that a step's loss does not depend on", trainer="Unused"),
    "rare": Feature(about="a parameter that the rows of some ranks alone lead to", trainer="Rare"),
    "buffers": Feature(
        # Ranks normalise by their own rows: these have the same mean and variance on all of them, but the correction
        # of the running variance knows their number.
        about="buffers: batch norm, rank 0's statistics",
        trainer="Normed",
        recipe=("train.micro_batch=null", "train.global_batch=6"),
        evaluation_rel=BAND,
    ),
    "dropout": Feature(about="dropout, a row at a time", trainer="Dropout", recipe=("train.micro_batch=1",)),
    "losses": Feature(about="two losses of one role, in turn", trainer="Losses"),
    "frozen-role": Feature(about="a role that is only asked (`optimizer: None`)", trainer="Distilled"),
    "gan": Feature(
        about="two roles whose losses run each other's model: `examples/gan.py`",
        trainer="Adversaries",
        recipe=("optimizer={lr: 1e-3, betas: [0.5, 0.999]}", "train.eval_every=0"),
    ),
    "evaluation": Feature(
        about="evaluation: the whole split, or some batches", recipe=("train.eval_every=2", "train.eval_batches=3")
    ),
    "call": Feature(about="`engine.call`: a function of the whole model", trainer="Called"),
    "activation-checkpointing": Feature(
        about="`strategy.options.activation_checkpointing`",
        trainer="Blocks",
        recipe=("strategy.options.activation_checkpointing=true",),
    ),
    "compile": Feature(
        about="`strategy.options.compile`", trainer="Compiled", recipe=("strategy.options.compile=true",)
    ),
    "hf": Feature(about="a model of transformers", trainer="Llama", requires=("transformers",)),
    "lora": Feature(
        about="adapters (LoRA) beside a frozen model of transformers",
        trainer="Adapters",
        requires=("transformers", "peft"),
    ),
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """What a strategy says instead of training; the alternatives of its message are checked to be honoured."""

    says: str  # a part of the message, in which strategies are `--strategy a, b or c`
    options: tuple[str, ...] = ()  # with these the same strategy honours the feature
    feature: str = ""  # this one it does honour


FIND = "strategy.options.find_unused_parameters=true"
_NEEDS_ALL = Refusal(
    says="freeze it (requires_grad_(False)) if nothing ever uses it, or use --strategy fsdp2 or horovod"
)
_DDP_NEEDS_ALL = Refusal(
    says="set find_unused_parameters: true in the options of --strategy ddp, or use --strategy fsdp2 or horovod"
)
# (feature, strategy) -> the refusal; a pair that is not here is honoured
REFUSED: Mapping[tuple[str, str], Refusal] = MappingProxyType({
    **{("fp16", name): Refusal(says="use train.precision: bf16 or fp32", feature="bf16") for name in ZERO},
    **{
        ("own-optimizer", name): Refusal(says="use the recipe's optimizer (adamw, sgd), or --strategy ddp or fsdp2")
        for name in ZERO
    },
    **{("scalar", name): Refusal(says="give it the shape (1,), or use --strategy ddp") for name in ("fsdp2", *ZERO)},
    **{(feature, name): _NEEDS_ALL for name in ZERO for feature in ("unused", "rare")},
    **{
        (feature, name): Refusal(says=_DDP_NEEDS_ALL.says, options=(FIND,) if name == "ddp" else ())
        for name in ("ddp", "accelerate")
        for feature in ("unused", "rare")
    },
    ("sgd", "zero2_offload"): Refusal(says="use optimizer.name: adamw, or --strategy zero2", feature="accumulation"),
    ("sgd", "zero3_offload"): Refusal(says="use optimizer.name: adamw, or --strategy zero3", feature="accumulation"),
})  # fmt: skip


def runnable() -> dict[str, Feature]:
    """The features whose packages are installed."""
    return {
        name: feature
        for name, feature in FEATURES.items()
        if all(importlib.util.find_spec(package) for package in feature.requires)
    }


def strategies() -> list[str]:
    """All registered strategies of the frameworks in the matrix but the reference, and but ray, which runs these."""
    return [name for name, entry in registry.STRATEGIES.items() if entry.framework in FRAMEWORKS and name != "single"]
