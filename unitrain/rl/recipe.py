"""The keys of `rl:` in a recipe, and each algorithm's defaults; each class checks its own values."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .. import registry
from ..errors import MissingExtra, RecipeError, Refused, UnknownName
from ..recipe import Recipe, above, at_least, key, mapping, one_of, section
from ..schema import build
from .kl import KL
from .sampler import SAMPLERS
from .sampling import Sampling

AGGREGATES = ("token", "sequence", "sequence_sum", "constant")
PLACEMENTS = ("PACK", "SPREAD")
BUFFERS = ("save", "requeue")
ROLES = ("reference", "critic", "reward")  # beside the policy
HOME = "unitrain.rl:"

# of trainers that learn from rewards
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "GRPO": {
            "samples_per_prompt": 8,
            "advantage": {"name": "grpo"},
            "loss": {"name": "ppo"},
            "kl": {"where": "loss", "estimator": "k3", "coef": 0.0},
        },
        "RLOO": {
            "samples_per_prompt": 4,
            "advantage": {"name": "rloo"},
            "loss": {"name": "ppo"},
            "aggregate": "sequence_sum",
            "kl": {"where": "reward", "estimator": "k1", "coef": 0.0},
        },
        "ReinforcePP": {
            "advantage": {"name": "reinforce++"},
            "loss": {"name": "ppo"},
            "kl": {"where": "reward", "estimator": "k1", "coef": 0.0},
        },
        "PPO": {
            "advantage": {"name": "gae"},
            "loss": {"name": "ppo"},
            "kl": {"where": "reward", "estimator": "k1", "coef": 0.0},
        },
    }
)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A function by its registered name or path, and its options."""

    name: str = key("", "a registered name, or `module:function`")
    options: Mapping[str, Any] = mapping("its options")


@dataclass(frozen=True, kw_only=True)
class FunctionRecipe:
    """One reward function among several."""

    function: str = key("", "`module:function`; it takes `completion`, `prompt` or columns of the data")
    weight: float = key(1.0, "its share of the sum")
    name: str = key("", "in metrics; empty: the function's own")


@dataclass(frozen=True, kw_only=True)
class RewardRecipe:
    """What a response is worth: the weighted sum of functions and of a learned model."""

    function: str = key("", "`module:function`; short for one of `functions`")
    functions: tuple[FunctionRecipe, ...] = key((), "several functions with weights")
    model: str | None = key(None, "the run of a reward model, whose score is added; null: none")
    model_weight: float = key(1.0, "what the score is multiplied by")
    processes: int = key(1, "worker processes of each rank")
    limit_seconds: float = key(5.0, "of one call")
    retries: int = key(1, "how often a failed call is made again")
    max_failures: int = key(0, "samples of a step that may have no reward; they are left out")

    def __post_init__(self) -> None:
        at_least("rl.reward.processes", self.processes, 1)
        above("rl.reward.limit_seconds", self.limit_seconds, 0)
        at_least("rl.reward.retries", self.retries, 0)
        at_least("rl.reward.max_failures", self.max_failures, 0)

    @property
    def all(self) -> tuple[FunctionRecipe, ...]:
        """Every function."""
        return (*([FunctionRecipe(function=self.function)] if self.function else []), *self.functions)


@dataclass(frozen=True, kw_only=True)
class CriticRecipe:
    """PPO's estimate of what is still to come."""

    lr: float | None = key(None, "learning rate; null: the policy's")
    clip: float | None = key(0.2, "most that a value moves in a step without penalty; null: no clipping")

    def __post_init__(self) -> None:
        if self.lr is not None:
            above("rl.critic.lr", self.lr, 0)
        if self.clip is not None:
            above("rl.critic.clip", self.clip, 0)


@dataclass(frozen=True, kw_only=True)
class CorrectionRecipe:
    """Truncated importance weights of samples that other weights, or another engine, drew."""

    level: str = key("token", "`token` or `sequence`")
    cap: float = key(2.0, "largest weight")
    beyond: str = key("truncate", "`truncate` to the cap, or `drop`: weight 0")

    def __post_init__(self) -> None:
        one_of("rl.correction.level", self.level, ("token", "sequence"))
        one_of("rl.correction.beyond", self.beyond, ("truncate", "drop"))
        above("rl.correction.cap", self.cap, 0)


@dataclass(frozen=True, kw_only=True)
class RolloutRecipe:
    """Who draws responses: the policy's own ranks, or a pool of actors beside them."""

    actors: int = key(0, "Ray actors that generate, each replaceable alone; 0: the policy's own ranks do")
    engine: str = key("own", "what an actor generates with: `own`, `vllm`, or a class by `module:Class`")
    options: Mapping[str, Any] = mapping("the engine's own")
    address: str | None = key(None, "a running Ray cluster; null: RAY_ADDRESS, else a private one on rank 0's machine")
    cpus: float = key(1.0, "CPUs that an actor asks Ray for")
    gpus: float = key(0.0, "GPUs that an actor asks Ray for; 0: it generates on the CPU")
    placement: str = key("PACK", "`PACK`: few nodes, or `SPREAD`: many")
    prompts_per_call: int = key(8, "prompts that are answered in one call; the unit that is sent out again")
    limit_seconds: float = key(300.0, "of one call; an actor that takes longer is replaced")
    retries: int = key(2, "times that a call which failed or lost its actor is made again, before its prompts are")
    max_failures: int = key(0, "prompts of a step that may stay without an answer; they are left out")
    max_losses: int = key(8, "actors lost in a row, without an answer between them, that end the run")

    def __post_init__(self) -> None:
        one_of("rl.rollout.placement", self.placement, PLACEMENTS)
        at_least("rl.rollout.actors", self.actors, 0)
        at_least("rl.rollout.cpus", self.cpus, 0)
        at_least("rl.rollout.gpus", self.gpus, 0)
        at_least("rl.rollout.prompts_per_call", self.prompts_per_call, 1)
        above("rl.rollout.limit_seconds", self.limit_seconds, 0)
        at_least("rl.rollout.retries", self.retries, 0)
        at_least("rl.rollout.max_failures", self.max_failures, 0)
        at_least("rl.rollout.max_losses", self.max_losses, 1)


@dataclass(frozen=True, kw_only=True)
class RL:
    """The keys of `rl:`; a trainer uses those that concern it."""

    base: str | None = key(None, "a run or checkpoint whose weights this one begins with; null: as `model:` says")
    samples_per_prompt: int = key(1, "responses to each of the step's `train.global_batch` prompts")
    sampling: Sampling = section(Sampling, "how responses are drawn")
    reward: RewardRecipe = section(RewardRecipe, "what a response is worth")
    advantage: Chosen = section(Chosen, "the advantage estimator")
    loss: Chosen = section(Chosen, "the policy or preference loss")
    aggregate: str = key("token", "what the loss is a mean over: `token`, `sequence`, `sequence_sum` or `constant`")
    epochs: int = key(1, "passes over a step's samples")
    minibatches: int = key(1, "updates of each pass")
    kl: KL = section(KL, "how the policy is held near the reference, which is what the run begins with")
    entropy: float = key(0.0, "what the entropy of each token is multiplied by and subtracted from the loss")
    critic: CriticRecipe = section(CriticRecipe, "of estimators that need values (gae)")
    correction: CorrectionRecipe | None = key(
        None, "weights for samples of other weights; null: none, or the defaults where max_staleness is above 0"
    )
    strategies: Mapping[str, Any] = mapping(
        "strategies of their own for `reference`, `critic` and `reward`, such as `{reference: fsdp2}`"
    )
    rollout: RolloutRecipe = section(RolloutRecipe, "who draws responses")
    max_staleness: int = key(0, "steps that generation may run ahead of training; 0: synchronous")
    buffer: str = key("requeue", "what becomes of answers ahead in a checkpoint: `save`, or `requeue`: drawn again")
    mask_truncated: bool = key(False, "learn nothing from responses that never ended")
    packing: bool = key(False, "of SFT: several examples in a row that do not see each other")
    trl: Mapping[str, Any] = mapping("of TRLSFT, TRLDPO and TRLKTO: arguments of TRL's own configuration, as they are")
    center: float = key(0.0, "of a reward model: pulls scores towards 0")

    def __post_init__(self) -> None:
        at_least("rl.samples_per_prompt", self.samples_per_prompt, 1)
        at_least("rl.epochs", self.epochs, 1)
        at_least("rl.minibatches", self.minibatches, 1)
        at_least("rl.center", self.center, 0)
        one_of("rl.aggregate", self.aggregate, AGGREGATES)
        for role, strategy in self.strategies.items():
            _check_strategy(role, strategy)
        at_least("rl.max_staleness", self.max_staleness, 0)
        one_of("rl.buffer", self.buffer, BUFFERS)
        if self.max_staleness and not self.rollout.actors:
            raise RecipeError(
                f"rl.max_staleness is {self.max_staleness}, but the ranks that train also generate; set "
                "rl.rollout.actors, or max_staleness to 0"
            )


def _check_strategy(role: str, strategy: Any) -> None:
    """Of a role beside the policy: a strategy whose ranks are the policy's own."""
    one_of("a key of rl.strategies", role, ROLES)
    if not isinstance(strategy, str):
        raise RecipeError(f"rl.strategies.{role} is {strategy!r}; give the name of a strategy")
    found = registry.entry("strategies", strategy)
    if found.inner or found.framework not in ("", "torch"):
        raise RecipeError(
            f"rl.strategies.{role} is {strategy}, whose ranks are not those of the policy; use ddp, fsdp2 or a zero"
        )


def check_rl(recipe: Recipe) -> None:
    """Refuse, before anything starts, what a trainer of unitrain.rl would refuse. Imports no framework."""
    if not recipe.trainer.startswith(HOME):
        return
    name = recipe.trainer.removeprefix(HOME)
    found = rl_recipe(recipe.rl, DEFAULTS.get(name, {}))
    refuse_strategy(recipe)
    if name.startswith("TRL") and importlib.util.find_spec("trl") is None:
        raise MissingExtra(f"the trainer {name}", "trl", "trl")
    if name in DEFAULTS:
        refuse_unfit(found)
        if found.rollout.actors and found.rollout.engine == "vllm" and recipe.model.name != "hf":
            raise RecipeError(
                f"rl.rollout.engine vllm generates with models of transformers, and model.name is "
                f"{recipe.model.name!r}; give model: {{name: hf}}, or engine own"
            )
    elif found.rollout.actors:
        raise RecipeError(
            f"rl.rollout.actors is {found.rollout.actors}, but {recipe.trainer} generates nothing to learn from"
        )


def refuse_strategy(recipe: Recipe) -> None:
    """Raise Refused where the models would not be torch's, in the trainer's own process."""
    name = recipe.strategy.name
    if registry.known("strategies", name).inner:
        raise Refused(
            f"{recipe.trainer} needs its models in its own process, and those of strategy {name} are in actors; use "
            "--strategy ddp or fsdp2, and --launcher ray for ranks on a Ray cluster"
        )
    if registry.framework_of(recipe.strategy) not in ("", "torch"):
        raise Refused(f"{recipe.trainer} is written for torch alone; use --strategy ddp or fsdp2, not {name}")


def refuse_unfit(options: RL) -> None:
    """Raise RecipeError, or MissingExtra, where nothing can be learnt from rewards this way."""
    if not options.reward.all and options.reward.model is None:
        raise RecipeError("rl.reward names no function and no model; give rl.reward.function: module:function")
    if options.sampling.temperature == 0:
        raise RecipeError("rl.sampling.temperature is 0, which explores nothing; use 1.0 for training")
    restricted = options.sampling.top_k is not None or options.sampling.top_p < 1
    if options.rollout.actors and options.rollout.engine == "vllm" and restricted:
        raise RecipeError(
            "rl.sampling.top_k and top_p are not for rl.rollout.engine vllm: it would give the log-probabilities of "
            "the restricted draw; leave them out"
        )
    if not options.rollout.actors:
        return
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("rl.rollout.actors", "ray", "ray")
    if ":" not in options.rollout.engine and options.rollout.engine not in SAMPLERS.names:
        raise UnknownName("rollout engine", options.rollout.engine, SAMPLERS.names)


def rl_recipe(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> RL:
    """The keys that were given over an algorithm's own defaults. Raises RecipeError."""
    return build(RL, _over(given, defaults), "rl")


def _over(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Group by group; a function that was named anew begins without the default's options."""
    found = dict(defaults)
    for name, value in given.items():
        own = found.get(name)
        if isinstance(own, Mapping) and isinstance(value, Mapping) and "name" not in value:
            value = _over(value, own)
        found[name] = value
    return found
