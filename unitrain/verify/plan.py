"""What a verification will run: the reference, each strategy that can be compared with it, and why others cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from .. import registry
from ..errors import MissingExtra, Refused, UserError
from ..recipe import CheckpointRecipe, LauncherRecipe, Recipe, StrategyRecipe
from ..recipe_file import check

REFERENCE = "single"
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Tier:
    """How near to the reference a run must be; docs/verify.md tells how the limits were chosen."""

    name: str
    losses: float  # largest relative difference of a step's loss
    weights: float  # largest difference of a final weight, relative to the largest of its tensor
    because: str


TIGHT = Tier(name="tight", losses=1e-5, weights=1e-3, because="fp32 without dropout on one framework")
CLOSE = Tier(name="close", losses=1e-4, weights=1e-2, because="fp32 without dropout on two frameworks")
BAND = Tier(name="band", losses=2e-2, weights=0.5, because="")
TIERS: Mapping[str, Tier] = {tier.name: tier for tier in (TIGHT, CLOSE, BAND)}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of the recipe."""

    recipe: Recipe
    tier: Tier

    @property
    def strategy(self) -> str:
        """Its name, or its path, module:Class."""
        return self.recipe.strategy.name

    @property
    def ranks(self) -> int:
        """On this machine."""
        return self.recipe.launcher.nproc

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^\w.-]+", "-", self.strategy)


class LeftOut(NamedTuple):
    """A strategy that is not run, and why."""

    strategy: str
    why: str  # not installed | refused
    reason: str  # with what to do about it


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The reference first, then the trials in the registry's order."""

    reference: Trial
    trials: tuple[Trial, ...]
    left_out: tuple[LeftOut, ...]


def make_plan(recipe: Recipe, strategies: str, nproc: int, steps: int, tier: str | None = None) -> Plan:
    """Check everything before anything starts. `strategies` is `all` or names with commas between; `tier` overrules.

    With `all`, what is not installed or refuses the recipe is left out; a strategy that was asked for by its name must
    be able to run. Raises UserErrors.
    """
    asked = list(dict.fromkeys(name for name in re.split(r"[,\s]+", strategies) if name))
    everything = asked == [ALL]
    if not asked or (ALL in asked and not everything):
        raise UserError(f"--strategies is {strategies!r}; give 'all', or names with commas between")
    names = [name for name in (registry.entries("strategies") if everything else asked) if name != REFERENCE]
    reference = _trial(_recipe(recipe, REFERENCE, 1, steps), tier)
    trials, left_out = [], []
    for name in names:
        try:
            trials.append(_trial(_recipe(recipe, name, nproc, steps), tier))
        except (MissingExtra, Refused) as error:
            if not everything:
                raise
            why = "not installed" if isinstance(error, MissingExtra) else "refused"
            left_out.append(LeftOut(name, why, str(error)))
    if not trials:
        reasons = "; ".join(reason for _, _, reason in left_out)
        raise UserError(f"there is nothing to compare with {REFERENCE!r}{f': {reasons}' if reasons else ''}")
    return Plan(reference=reference, trials=tuple(trials), left_out=tuple(left_out))


def _recipe(recipe: Recipe, strategy: str, nproc: int, steps: int) -> Recipe:
    """The recipe on that strategy: every loss logged, no evaluation, one checkpoint at the end."""
    # The recipe's options are for the recipe's strategy.
    options = recipe.strategy.options if strategy == recipe.strategy.name else {}
    return recipe.replace(
        train=replace(recipe.train, steps=steps, log_every=1, eval_every=0),
        strategy=StrategyRecipe(name=strategy, options=options),
        launcher=LauncherRecipe(name="local", nproc=nproc),
        checkpoint=CheckpointRecipe(every=None, keep=1),
    )


def _trial(recipe: Recipe, tier: str | None) -> Trial:
    """Raises UserErrors where the recipe cannot run as it is."""
    check(recipe, with_strategy=True)
    return Trial(recipe=recipe, tier=replace(TIERS[tier], because="as asked for") if tier else tier_of(recipe))


def tier_of(recipe: Recipe) -> Tier:
    """How near this recipe can come to the reference: as near as rounding allows, where nothing else differs."""
    reasons = [] if recipe.train.precision == "fp32" else [f"precision {recipe.train.precision}"]
    reasons += [f"{key} {value}" for key, value in recipe.strategy.options.items() if value in ("bf16", "fp16")]
    reasons += [f"{key} {value}" for key, value in recipe.model.options.items() if "dropout" in key and value]
    if reasons:
        return replace(BAND, because=", ".join(reasons))
    return TIGHT if _framework(recipe.strategy) == _framework(StrategyRecipe(name=REFERENCE)) else CLOSE


def _framework(strategy: StrategyRecipe) -> str:
    inner = registry.inner(strategy).name
    # a third party's class knows
    return registry.framework_of(strategy) or str(registry.load("strategies", inner).framework)
