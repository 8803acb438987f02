"""A whole verification: every run of a plan, one after the other, and what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .compare import Comparison, compare
from .plan import LeftOut, Plan, Trial
from .trial import Outcome, run_trial

FILE = "verify.json"


@dataclass(frozen=True)
class Row:
    """One run and, where both it and the reference ended well, how they compare."""

    outcome: Outcome
    comparison: Comparison | None = None
    is_reference: bool = False

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.outcome.error:
            return f"failed: {self.outcome.error}"
        if self.is_reference:
            return "reference"
        assert self.comparison is not None, "it ended well, and so did the reference"
        return self.comparison.verdict

    @property
    def good(self) -> bool:
        """True for the reference, and for a run that agrees with it."""
        return not self.outcome.error and (self.is_reference or bool(self.comparison and self.comparison.agrees))


@dataclass(frozen=True)
class Verification:
    """The reference's row first. Without a sound reference the other runs were not started."""

    rows: list[Row]
    left_out: tuple[LeftOut, ...]

    @property
    def passed(self) -> bool:
        """True when at least one run was compared and all agree."""
        return len(self.rows) > 1 and all(row.good for row in self.rows)


def verify(plan: Plan, root: Path, say: Callable[[str], None]) -> Verification:
    """Run the plan below `root` and compare. `say` hears one line before and after each run. Raises Interrupted."""
    reference = _run(plan.reference, root, say)
    if not reference.error and None in reference.losses:
        step = reference.losses.index(None) + 1
        reference = replace(
            reference, error=f"its loss is not finite at step {step}, so nothing can be compared with it"
        )
        say(f"  {reference.error}")
    rows = [Row(reference, is_reference=True)]
    for trial in plan.trials if not reference.error else ():
        outcome = _run(trial, root, say)
        if outcome.error:
            rows.append(Row(outcome))
            continue
        try:
            rows.append(Row(outcome, compare(outcome, reference)))
        except CheckpointError as error:
            rows.append(Row(replace(outcome, error=str(error))))
    return Verification(rows, plan.left_out)


def as_json(found: Verification, plan: Plan) -> str:
    """verify.json: every figure and every curve; null stands for what is not finite."""
    recipe = plan.reference.recipe
    document = {
        "name": recipe.name,
        "steps": recipe.train.steps,
        "precision": recipe.train.precision,
        "reference": plan.reference.strategy,
        "passed": found.passed,
        "rows": [_row(row) for row in found.rows],
        "not_run": [left_out._asdict() for left_out in found.left_out],
    }
    return json.dumps(document, indent=1) + "\n"


def _row(row: Row) -> dict[str, Any]:
    outcome, comparison = row.outcome, row.comparison
    values: dict[str, Any] = {
        "strategy": outcome.trial.strategy,
        "ranks": outcome.trial.ranks,
        "folder": str(outcome.folder),
        "verdict": row.verdict,
        "good": row.good,
        "seconds": outcome.seconds,
        "memory_bytes": outcome.memory_bytes,
        "losses": outcome.losses,
    }
    if comparison is not None:
        tier = comparison.tier
        values |= {
            "tier": {"name": tier.name, "losses": tier.losses, "weights": tier.weights, "because": tier.because},
            "loss_difference": _finite(comparison.largest),
            "first_step_beyond": comparison.first_beyond,
            "loss_differences": [_finite(value) for value in comparison.differences],
            "weights_difference": _finite(comparison.weights.difference),
            "weights_tensor": comparison.weights.tensor,
            "weights_compared": comparison.weights.compared,
            "weights_left_out": comparison.weights.left_out,
        }
    return values


def _run(trial: Trial, root: Path, say: Callable[[str], None]) -> Outcome:
    say(f"{trial.strategy} on {trial.ranks} rank{'' if trial.ranks == 1 else 's'} ...")
    outcome = run_trial(trial, root)
    if outcome.error:
        say(f"  failed: {outcome.error}")
    else:
        say(f"  {len(outcome.losses)} steps in {outcome.seconds:.1f} s, loss {outcome.losses[-1]}")
    return outcome


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
