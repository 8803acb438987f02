"""Did the disturbed run end as the other one? Every step once, every loss and every bit of the last checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..audit import audit
from ..checkpoint import CheckpointReader, open_newest
from ..errors import CheckpointError, ExitCode
from ..recipe import Recipe
from ..run import Run
from .drill import Trouble
from .plan import Plan

FILE = "chaos.json"
_OF_STEP = ("loss", "grad_norm", "lr", "samples", "tokens")  # the rest of a record is time and memory


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a drill."""

    troubles: Sequence[Trouble]
    exit_code: int
    samples_lost: int  # of steps that no line of the metrics speaks of
    samples_repeated: int  # of steps that several do
    first_other_step: int | None  # the first whose loss, gradient or samples differ in any bit
    weights_differ: list[str] = field(default_factory=list)  # tensors of the last checkpoint
    tensors: int = 0  # compared
    audit_problems: list[str] = field(default_factory=list)  # what speaks against each sample's having been used once
    error: str = ""

    @property
    def same(self) -> bool:
        """True when nothing tells the two runs apart."""
        exact = self.first_other_step is None and not self.weights_differ and not self.error
        return exact and not self.samples_lost and not self.samples_repeated and not self.audit_problems

    @property
    def passed(self) -> bool:
        """True when every fault came and was survived, and the end is the same."""
        survived = all(trouble.survived for trouble in self.troubles)
        return self.exit_code == ExitCode.DONE and survived and self.same


def judge(plan: Plan, reference: Run, disturbed: Run, troubles: Sequence[Trouble], exit_code: int) -> Verdict:
    """Compare what the two runs have left."""
    theirs, ours = _steps(reference), _steps(disturbed)
    steps = range(1, plan.recipe.train.steps + 1)
    counts = Counter(step for step, _ in ours)
    by_step, expected = dict(ours), dict(theirs)
    batch = plan.recipe.train.global_batch
    facts: dict[str, Any] = {
        "troubles": troubles,
        "exit_code": exit_code,
        "audit_problems": audit(disturbed).problems,
        "samples_lost": batch * sum(step not in counts for step in steps),
        "samples_repeated": batch * sum(count - 1 for count in counts.values()),
        "first_other_step": next((step for step in steps if by_step.get(step) != expected.get(step)), None),
    }
    if exit_code != ExitCode.DONE:
        return Verdict(**facts, error=f"it ended with exit code {exit_code}")
    try:
        wanted, found = _last(reference, plan.recipe), _last(disturbed, plan.recipe)
    except CheckpointError as error:
        return Verdict(**facts, error=str(error))
    differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    return Verdict(**facts, weights_differ=differing, tensors=len(wanted))


def as_json(found: Verdict, plan: Plan) -> str:
    """chaos.json: everything that was measured."""
    faults = [
        {
            **{key: value for key, value in asdict(trouble).items() if key not in ("fault", "at", "num_events")},
            "fault": str(trouble.fault),
            "verdict": trouble.verdict,
            "survived": trouble.survived,
        }
        for trouble in found.troubles
    ]
    document = {
        "name": plan.recipe.name,
        "strategy": plan.recipe.strategy.name,
        "ranks": plan.recipe.launcher.nproc,
        "steps": plan.recipe.train.steps,
        "passed": found.passed,
        "exit_code": found.exit_code,
        "faults": faults,
        "samples_lost": found.samples_lost,
        "samples_repeated": found.samples_repeated,
        "first_other_step": found.first_other_step,
        "audit_problems": found.audit_problems,
        "tensors_compared": found.tensors,
        "tensors_that_differ": found.weights_differ,
        "error": found.error,
    }
    return json.dumps(document, indent=1) + "\n"


def _steps(run: Run) -> list[tuple[int, tuple[Any, ...]]]:
    """Each line of training: its step, and what must not depend on any fault."""
    records = [record for record in run.metrics() if record["split"] == "train"]
    return [(record["step"], tuple(record.get(key) for key in _OF_STEP)) for record in records]


def _last(run: Run, recipe: Recipe) -> dict[str, bytes]:
    """All bits of the checkpoint of the last step. Raises CheckpointError where it is not there, whole."""
    reader = open_newest(run.checkpoints(recipe)).reader
    if reader is None or reader.step != recipe.train.steps:
        raise CheckpointError(f"{run.folder} has no sound checkpoint of step {recipe.train.steps}")
    return {
        f"{role} {kind} {name}": _bytes(reader, role, kind, name)
        for role in reader.roles
        for kind, name in reader.role(role).tensors
    }


def _bytes(reader: CheckpointReader, role: str, kind: str, name: str) -> bytes:
    held = reader.role(role)
    shape = held.tensors[kind, name].shape
    return held.read(kind, name, (0,) * len(shape), tuple(shape)).tobytes()
