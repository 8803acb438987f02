"""Policies that learn from rewards: PPO with a critic, GRPO, RLOO, REINFORCE++.

A step answers its prompts, scores the answers, and updates the policy (and the critic) on them:

    generate -> reward -> log-probabilities (policy, reference), values -> advantages -> epochs of updates

Everything between generation and updates is known to all ranks, in numpy; a step is a function of the weights, the
seed and its number, so that a resumed run goes on bit by bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import registry
from ..batch import Batch
from ..checkpoint import Saver
from ..cursor import mix, sample_ids
from ..data.feed import Feed
from ..data.records import Prompts, View
from ..errors import RecipeError, UserError
from ..heartbeat import Phase
from ..models.config import GPT
from ..models.gpt_torch import logits_of
from ..models.hf_config import HF
from ..strategy import Loss, Role, StepOut
from ..tasks.named import NamedModel, named_model
from .advantages import Advantages, Episodes
from .aggregate_torch import aggregated, plus
from .base import Base
from .buffer import Buffer, Group
from .importance import MOST_IMPORTANCE, Gap, correction, gap
from .kl import KLControl, estimate
from .kl_torch import kl_loss
from .logprobs_torch import token_logprobs
from .policy_losses_torch import PerToken, Tokens, policy_loss, value_loss
from .prompts import Request, asked, minibatches
from .recipe import DEFAULTS, CorrectionRecipe, refuse_unfit
from .registry import ADVANTAGES, POLICY_LOSSES
from .rollout_pool_torch import PoolRollout
from .rollout_torch import LocalRollout, means, stopping
from .sampler import Plan
from .samples import Arrays, Sample, collate, scored_mask, token_rewards, trained_mask
from .sft_torch import greedy, rewards_of
from .task_torch import RLTask, built
from .value_torch import ValueModel, last_values, values_of, with_last
from .weights_torch import Outbox

_PURPOSE = 0x5055  # keeps keys of updates apart from others


class PolicyGradient(RLTask):
    """`data:` records of prompts; `train.global_batch` of them a step, each answered `rl.samples_per_prompt` times.

    Roles: `model` is the policy; `reference`, unless rl.kl.where is none; `critic`, where the estimator takes values;
    `reward`, where a learned model scores.
    """

    view: ClassVar[type[View] | None] = Prompts
    with_critic: ClassVar[bool] = False
    of_a_session: ClassVar[tuple[str, ...]] = ("rows", "_rollout")

    # What is built.

    def roles(self) -> dict[str, Role]:
        """See Trainer."""
        roles = super().roles()
        options = self.rl
        refuse_unfit(options)
        _ = self.estimator, self.policy_function  # a mistake in their options is told before anything starts
        if options.kl.where != "none":
            roles["reference"] = self.reference()
        if self.with_critic:
            roles["critic"] = Role(
                model=self.critic_model.build,
                losses={"value": self.value_loss},
                optimizer=dataclasses.replace(self.recipe.optimizer, lr=options.critic.lr or self.recipe.optimizer.lr),
                initial=self.critic_model.initial,
                checkpoint="trainable" if self._adapts else "all",
            )
        if (scorer := self.scorer) is not None:
            roles["reward"] = Role(model=scorer.frozen, initial=scorer.initial, checkpoint="trainable")
        return self.placed(roles)

    def identity(self) -> dict[str, Any]:
        """See Trainer."""
        return super().identity() | ({} if self.reward_base is None else {"rl.reward.model": self.reward_base.digest})

    @functools.cached_property
    def critic_model(self) -> ValueModel:
        """The policy's own architecture and first weights, with a head of one output."""
        return ValueModel(self.config, self.initial)

    @functools.cached_property
    def reward_base(self) -> Base | None:
        """The checkpoint of the learned reward."""
        path = self.rl.reward.model
        return None if path is None else Base(path, "rl.reward.model")

    @functools.cached_property
    def scorer(self) -> ValueModel | None:
        """The learned reward, as its own recipe describes it."""
        base = self.reward_base
        if base is None:
            return None
        config: GPT | HF = named_model(base.recipe(), GPT, HF, task="causal-lm")
        if isinstance(config, HF) and config.lora is not None:
            raise RecipeError("rl.reward.model is a run of adapters; train a reward model without model.lora")
        config = config.with_vocabulary(self.records("train").vocab_size)
        model = ValueModel(config, self.initial)

        def saved(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
            found = base.value(name, shape)
            assert found is not None, "a reward model has no adapters"
            return found

        model.initial = saved  # type: ignore[method-assign]  # its head too
        return model

    @functools.cached_property
    def estimator(self) -> Callable[[Episodes], Advantages]:
        """The advantage estimator with its options."""
        found: Callable[[Episodes], Advantages] = ADVANTAGES.bind(self.rl.advantage.name, self.rl.advantage.options)
        return found

    @functools.cached_property
    def policy_function(self) -> Callable[[Tokens], PerToken]:
        """The policy loss with its options."""
        found: Callable[[Tokens], PerToken] = POLICY_LOSSES.bind(self.rl.loss.name, self.rl.loss.options)
        return found

    # A step.

    def step(self, batch: Batch) -> StepOut:
        """See Trainer."""
        self.seconds = {}
        control = self._control_of_kl()
        samples = [sample for group in self.rollout(batch) for sample in group.samples]
        self.seconds |= self._rollout.seconds
        out = self.learn(batch.step, samples, control)
        # The answers ahead, if there are any, are added when a checkpoint is written: it may have to wait for them.
        empty = Buffer(prompts=self.recipe.train.global_batch, step=batch.step + 1).state()
        state = {"version": batch.step + 1, "kl": control.state(), "buffer": empty}
        self.extra = {**self.extra, "rl": state}
        return out

    def rollout(self, batch: Batch) -> list[Group]:
        """Samples of the step's prompts, drawn by the weights that it trains, or up to max_staleness older ones.

        A collective. A prompt that was given up has no group.
        """
        options, records = self.rl, self.records("train")
        samples = self._rollout.samples(
            self._requests(batch.step),
            records,
            options.sampling,
            version=batch.step,
            max_failures=options.reward.max_failures,
        )
        groups: dict[int, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.place, []).append(sample)
        return [Group(batch.step, place, tuple(own)) for place, own in groups.items()]

    def rollout_model(self) -> Callable[[], Any]:
        """What builds the policy's module in another process; override it together with `build_model`."""
        if type(self).build_model is not NamedModel.build_model:
            raise UserError(
                f"{type(self).__name__} overrides build_model, which an actor cannot call; override rollout_model too, "
                "to return a function at the top of a module that builds the same, or set rl.rollout.actors to 0"
            )
        return functools.partial(built, self.config)

    def learn(self, step: int, samples: Sequence[Sample], control: KLControl) -> StepOut:
        """Update on a step's samples. A collective."""
        options, seed = self.rl, self.recipe.train.seed
        arrays = collate(samples)
        learned = self._add_scores(arrays)
        self._coef = control.coef
        first = self._minibatches(seed, step, 0, len(samples))
        facts = means(samples, several=bool(learned)) | learned | {"reward": _mean(arrays["rewards"])}
        mask = scored_mask(arrays)
        began = time.monotonic()
        # The first epoch's own parts: the first update then finds a ratio of exactly 1.
        arrays["old"], entropy = self.rows.forward(self.engines["model"], self._logprobs, arrays, first)
        per_token = token_rewards(arrays["rewards"], mask)
        if "reference" in self.engines:
            arrays["ref"] = self.rows.forward(self.engines["reference"], self._logprobs, arrays, first)[0]
            facts["kl"] = float(estimate("k3", arrays["old"], arrays["ref"], mask).sum() / max(len(samples), 1))
            facts["kl_coef"] = self._coef
            if options.kl.where == "reward":
                per_token -= self._coef * estimate(options.kl.estimator, arrays["old"], arrays["ref"], mask)
        if "critic" in self.engines:
            arrays["values"] = self.rows.forward(self.engines["critic"], _values, arrays, first)[0]
        found = self.estimator(
            Episodes(rewards=per_token, mask=mask, groups=arrays["groups"], values=arrays.get("values"))
        )
        difference = gap(arrays["old"], arrays["rollout"], mask)
        staleness = step - arrays["versions"]
        facts |= {
            "entropy": float(entropy[mask].mean()) if mask.any() else math.nan,
            "ended": float(arrays["ended"].mean()),
            "gap": difference.mean,
            "gap_max": difference.most,
            "importance": difference.ratio,
            "staleness": float(staleness.mean()),
            "staleness_max": float(staleness.max()),
            "generated": float((step + 1) * self.recipe.train.global_batch * options.samples_per_prompt),
            **self._rollout.facts,
        }
        # Stale samples differ because they are meant to.
        fresh = gap(arrays["old"], arrays["rollout"], mask & (staleness == 0)[:, None])
        self._tell_gap(fresh)
        self._tell_importance(difference)
        learning = time.monotonic()
        self.seconds["logprobs"] = learning - began
        outs = self._updates(step, arrays, found, mask)
        self.seconds["update"] = time.monotonic() - learning
        facts |= {f"{phase}_seconds": seconds for phase, seconds in self.seconds.items()}
        if "kl" in facts:
            control.update(facts["kl"], len(samples))
        return PolicyStepOut(*outs, facts)

    def _updates(
        self, step: int, arrays: Arrays, found: Advantages, mask: NDArray[np.bool_]
    ) -> tuple[list[StepOut], list[StepOut]]:
        """Every update of the step, of the policy and of the critic."""
        options, seed = self.rl, self.recipe.train.seed
        learnt: dict[str, NDArray[Any]] = {name: arrays[name] for name in ("tokens", "targets", "old")}
        learnt["mask"] = trained_mask(arrays, mask_truncated=options.mask_truncated)
        learnt["advantages"] = found.advantages.astype(np.float32)
        if options.kl.where == "loss":
            learnt["ref"] = arrays["ref"]
        corrected = options.correction or (CorrectionRecipe() if options.max_staleness else None)
        if corrected is not None:
            weights = correction(arrays["old"], arrays["rollout"], mask, **dataclasses.asdict(corrected))
            learnt["weights"] = weights.astype(np.float32)
        valued: dict[str, NDArray[Any]] = {}
        if "critic" in self.engines:
            assert found.returns is not None, "of an estimator that takes values"
            valued = {name: arrays[name] for name in ("tokens", "values")}
            valued |= {"mask": mask, "returns": found.returns.astype(np.float32)}
        policy: list[StepOut] = []
        critic: list[StepOut] = []
        for epoch in range(options.epochs):
            for number, rows in enumerate(self._minibatches(seed, step, epoch, len(mask))):
                key = mix(seed, _PURPOSE, step, epoch, number)
                if learnt["mask"][rows].any():
                    batch = self.rows.batch(step, learnt, rows, key)
                    policy.append(self.engines["model"].update(batch, self.hp()))
                if valued and mask[rows].any():
                    batch = self.rows.batch(step, valued, rows, key)
                    critic.append(self.engines["critic"].update(batch, self.hp("critic"), "value"))
        return policy, critic

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The policy loss over unmasked tokens, with KL and entropy terms where the recipe has them."""
        options, mask = self.rl, batch["mask"]
        model.eval()  # no dropout: what is trained is what drew the samples
        logits = logits_of(model(batch["tokens"]))
        logprobs, entropy = token_logprobs(logits, batch["targets"], temperature=options.sampling.scale, mask=mask)
        tokens = Tokens(logprobs, batch["old"], batch["advantages"], mask)
        how: dict[str, Any] = {"aggregate": options.aggregate, "max_tokens": options.sampling.max_tokens}
        found = policy_loss(self.policy_function, tokens, weights=batch.get("weights"), **how)
        if options.kl.where == "loss":
            old = batch["old"] if options.kl.corrected else None
            term = kl_loss(options.kl.estimator, logprobs, batch["ref"], mask, old=old, **how)
            found = plus(found, self._coef, term, "kl_loss")
        if options.entropy:
            found = plus(found, -options.entropy, Loss(*aggregated(entropy, mask, **how)), "entropy_bonus")
        return found

    def value_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The critic's loss."""
        model.eval()
        values = values_of(model, batch["tokens"])
        return value_loss(values, batch["values"], batch["returns"], batch["mask"], clip=self.rl.critic.clip)

    # Evaluation, state, and what people see.

    def evaluate(self) -> dict[str, float]:
        """Mean reward of greedy responses to the held-out prompts, by the reward functions."""
        return greedy(self)

    def _control_of_kl(self) -> KLControl:
        """From `extra`, which is what the checkpoint says after a resume or a rollback."""
        control, saved = KLControl(self.rl.kl), self.extra.get("rl")
        if saved is not None:
            control.load(saved["kl"])
        return control

    def _requests(self, step: int) -> list[Request]:
        """Of any step: what its batch will be unless samples are skipped before."""
        train, records = self.recipe.train, self.records("train")
        ids = sample_ids(train.seed, step, train.global_batch, len(records), self._guard.skipped)
        return asked(step, ids, self.rl.samples_per_prompt)

    @contextlib.contextmanager
    def _session(self) -> Iterator[tuple[Feed, Saver]]:
        """See Trainer. Actors are there before the first step, and gone after the last."""
        with super()._session() as session:
            rollout = self._rollout
            if isinstance(rollout, PoolRollout):
                self._signals.hold()  # Ray has handlers of its own
                rollout.load(self.cursor.step, self.extra.get("rl", {}).get("buffer"))
            yield session

    def _load(self, folder: str) -> None:
        """See Trainer. After a rollback, answers to prompts ahead are of weights that are no more."""
        super()._load(folder)
        if isinstance(rollout := self.__dict__.get("_rollout"), PoolRollout):
            rollout.load(self.cursor.step, self.extra.get("rl", {}).get("buffer"))

    def _state(self) -> dict[str, Any]:
        """See Trainer. With the answers ahead, where they are to be saved."""
        rollout = self.__dict__.get("_rollout")
        if isinstance(rollout, PoolRollout) and "rl" in self.extra and self.world.first:
            buffer = rollout.state(self.cursor.step, self.rl.buffer)
            return super()._state() | {"extra": {**self.extra, "rl": {**self.extra["rl"], "buffer": buffer}}}
        return super()._state()

    @functools.cached_property
    def _rollout(self) -> LocalRollout | PoolRollout:
        options = self.rl
        first = not options.rollout.actors or self.world.first  # who scores
        rewards = self.opened.enter_context(rewards_of(self)) if options.reward.all and first else None
        engine, seed = self.engines["model"], self.recipe.train.seed
        if not options.rollout.actors:
            return LocalRollout(engine, self.rows, rewards, run_seed=seed, tell=self._event)
        return PoolRollout(
            options,
            Outbox(engine, self.rows, self.rollout_model(), lambda name, shape: self.initial(name, shape, seed)),
            self.rows,
            self._control.share,
            self._pool() if self.world.first else None,
            rewards,
            prompts=self.recipe.train.global_batch,
            requests=self._requests,
            steps=self.recipe.train.steps,
            beat=lambda: self._beat(Phase.STEP),
            tell=self._event,
        )

    def _pool(self) -> Any:
        """The actors, of whose framework only the pool knows."""
        options, records = self.rl, self.records("train")
        assert self.run is not None, "of a session"
        plan = Plan(
            model=self.rollout_model(),
            config=self.config,
            precision=self.recipe.train.precision,
            run_seed=self.recipe.train.seed,
            gpu=options.rollout.gpus > 0,
            threads=max(1, int(options.rollout.cpus)),
            options=dict(options.rollout.options),
        )
        pool = registry.resolve("unitrain.rl.pool_ray:RolloutPool")(
            options.rollout,
            plan,
            records.prompt,
            stopping(options.sampling, records),
            run_id=self.run.id,
            attempt=self._nonce,
            ahead=options.max_staleness > 0,
            tell=self._event,
        )
        return self.opened.enter_context(pool)

    def _minibatches(self, seed: int, step: int, epoch: int, rows: int) -> list[NDArray[np.int64]]:
        parts = minibatches(seed, step, epoch, rows=rows, num=self.rl.minibatches)
        return [part for part in parts if len(part)]

    def _add_scores(self, arrays: Arrays) -> dict[str, float]:
        """Add the learned model's scores to the rewards; their mean as a metric."""
        if "reward" not in self.engines:
            return {}
        everything = [np.arange(len(arrays["tokens"]))]
        score = self.rows.forward(self.engines["reward"], _scores, arrays, everything)[0]
        arrays["rewards"] = arrays["rewards"] + self.rl.reward.model_weight * score
        return {"reward/model": float(score.mean())}

    def _logprobs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = logits_of(model(batch["tokens"]))
        return token_logprobs(logits, batch["targets"], temperature=self.rl.sampling.scale, mask=batch["mask"])

    def _tell_gap(self, difference: Gap) -> None:
        """Say once that the rollout does not compute what the trainer does."""
        problem = difference.problem(self.recipe.train.precision)
        if problem and not self._told and self.world.first:
            print(f"warning: {problem}", flush=True)
            self._event("rollout_gap", mean=difference.mean, most=difference.most)
        self._told = self._told or bool(problem)

    def _tell_importance(self, difference: Gap) -> None:
        """Say once that samples of older weights are too far from the policy to correct."""
        if abs(difference.ratio - 1) > MOST_IMPORTANCE and not self._told_importance and self.world.first:
            print(
                f"warning: the mean importance ratio of the samples is {difference.ratio:.3g}, and 1 is right: the "
                "policy moves too far in rl.max_staleness steps, or the rollout has other weights; use a smaller "
                "max_staleness or learning rate",
                flush=True,
            )
            self._event("importance", mean=difference.ratio, kl=difference.kl)
            self._told_importance = True

    _told = _told_importance = False
    _coef = 0.0
    seconds: dict[str, float]  # of the last step by phase: generate, reward, sync, logprobs, update


class GRPO(PolicyGradient):
    """Shao et al., "DeepSeekMath", 2024: rewards against the others of the same prompt, KL in the loss."""

    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS["GRPO"]


class RLOO(PolicyGradient):
    """Ahmadian et al., "Back to Basics", 2024: rewards against the mean of the prompt's others, KL in the reward."""

    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS["RLOO"]


class ReinforcePP(PolicyGradient):
    """Hu, "REINFORCE++", 2025: whitened sums of rewards, KL in the reward, no critic."""

    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS["ReinforcePP"]


class PPO(PolicyGradient):
    """Schulman et al., 2017, with a critic and generalised advantage estimation; KL in the reward."""

    with_critic: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS["PPO"]


class PolicyStepOut(StepOut):
    """Several updates as one: means over the policy's, the critic's with a prefix, and the facts of the step."""

    def __init__(self, policy: list[StepOut], critic: list[StepOut], facts: Mapping[str, float]) -> None:
        self.policy, self.critic, self.facts = policy, critic, facts

    @property
    def loss(self) -> Any:
        """Of the last update of the policy; NaN where no sample had a reward."""
        return self.policy[-1].loss if self.policy else math.nan

    def read(self) -> dict[str, float]:
        """See StepOut."""
        found = _averaged([out.read() for out in self.policy])
        found |= {f"critic_{name}": value for name, value in _averaged([out.read() for out in self.critic]).items()}
        for name in ("critic_weight", "critic_applied"):
            found.pop(name, None)
        return {"loss": math.nan, "grad_norm": math.nan, "applied": 0.0, **found, **self.facts}

    def verdict(self) -> tuple[float, bool]:
        """See StepOut."""
        found = [out.verdict() for out in (*self.policy, *self.critic)]
        own = [loss for loss, _ in found[: len(self.policy)]]
        return float(np.mean(own)) if own else math.nan, bool(own) and all(applied for _, applied in found)


def _averaged(values: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in values for name in each)
    found = {name: float(np.mean([each[name] for each in values if name in each])) for name in names}
    if values:
        found["applied"] = min(each["applied"] for each in values)
    return found


def _mean(rewards: NDArray[np.float64]) -> float:
    return float(np.nanmean(rewards)) if not np.isnan(rewards).all() else math.nan


def _values(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor]:
    return (values_of(model, batch["tokens"]),)


def _scores(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor]:
    return (last_values(model, *with_last(batch["tokens"], batch["targets"], batch["mask"])),)
