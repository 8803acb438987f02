"""Was every sample used exactly once? Proved from the ledger, over all kills, resumes, resizes and rollbacks.

The ledger tells which steps became durable and what ids the loop took for them; the lines that a later attempt or a
rollback took back do not count. The ids are computed anew here, compared with what was taken, and counted by epoch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import CheckpointReader, newest
from .cursor import Window, ids_at, positions, with_window
from .errors import UserError
from .ledger import FILE, read_ledger, well_formed
from .recipe_file import load_recipe
from .run import Run


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """How often the samples of one pass over the data were used."""

    number: int  # from 0
    once: int
    repeated: int
    missing: int
    skipped: int  # on purpose, by the guard
    to_come: int  # the run has not come so far


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """From where an attempt went on, and on what."""

    step: int
    strategy: str
    world_size: int


@dataclass(kw_only=True)
class Audit:
    """What the records prove, and what speaks against them."""

    steps: int = 0  # durable ones, which the newest weights have seen
    redone: int = 0  # durable once, and then taken back
    rollbacks: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """True when every sample of each epoch was used exactly once, but for those skipped on purpose."""
        return not self.problems


def audit(run: Run) -> Audit:
    """Audit a run. Raises UserError for one that has no ledger."""
    path = run.folder / FILE
    if not path.exists() and not any(event["event"] == "start" for event in run.events()):
        raise UserError(f"{run.folder} has no {FILE}: the run has not begun")
    lines, problems = read_ledger(path)
    found = Audit(problems=problems)
    bad = [line for line in lines if not well_formed(line)]
    if bad or not lines or lines[0]["kind"] != "begin":
        found.problems.append(f"{FILE}: line {bad[0]['n'] if bad else 0} is none that a run writes")
        return found
    lineage = _Lineage(found)
    for line in lines:
        lineage.take(line)
    written = lineage.step
    for line in _of_checkpoint(run, lines, found):
        lineage.take(line)
    found.steps = lineage.step
    _count(lineage, found)
    _compare_with_run(run, written, found)
    return found


class _Lineage:
    """The durable steps that the newest weights have seen, as lines of the ledger."""

    def __init__(self, found: Audit) -> None:
        self.found = found
        self.lines: list[dict[str, Any]] = []
        self.begin: dict[str, Any] = {}
        self.skips: list[tuple[int, Window]] = []  # from which step on (from 0), and what

    @property
    def step(self) -> int:
        return self.lines[-1]["last"] if self.lines else 0

    @property
    def skipped(self) -> tuple[Window, ...]:
        skipped: tuple[Window, ...] = ()
        for _, window in self.skips:
            skipped = with_window(skipped, window)
        return skipped

    def take(self, line: dict[str, Any]) -> None:
        """One more line, in the order in which they were written."""
        problems = self.found.problems
        if line["kind"] == "begin":
            for key in ("seed", "global_batch", "size"):
                if self.begin and self.begin[key] != line[key]:
                    problems.append(f"attempt {line['attempt']} has another {key}: {line[key]}, not {self.begin[key]}")
            self.begin = line
            self.found.attempts.append(
                Attempt(step=line["step"], strategy=line["strategy"], world_size=line["world_size"])
            )
            self._go_back(line["step"], f"attempt {line['attempt']} began")
        elif line["attempt"] != self.begin["attempt"]:
            pass  # of an attempt that another had replaced: it does not count, and would be missed if it should
        elif line["kind"] == "rollback":
            self.found.rollbacks += 1
            self._go_back(line["to"], "a rollback went")
            begin, end = line["skip"]
            self.skips.append((line["to"], (begin, end)))
        elif line["first"] != self.step + 1:
            what = "are recorded twice" if line["first"] <= self.step else "are in no line"
            low, high = sorted((line["first"], self.step + 1))
            problems.append(f"steps {low} to {high - 1} {what}")
            self.lines.append(line)
        else:
            self.lines.append(line)

    def _go_back(self, step: int, who: str) -> None:
        while self.lines and self.lines[-1]["first"] > step:
            line = self.lines.pop()
            self.found.redone += line["last"] - line["first"] + 1
        if self.step != step:
            self.found.problems.append(f"{who} at step {step}, and the durable steps end at {self.step}")


def _of_checkpoint(run: Run, lines: Sequence[dict[str, Any]], found: Audit) -> Iterator[dict[str, Any]]:
    """Steps that the newest checkpoint has and the ledger does not: a crash came between the two."""
    try:
        place = newest(run.checkpoints(load_recipe(run.recipe_path)))
        known = [] if place is None else CheckpointReader(place.folder).state.get("ledger", [])
    except Exception as error:  # of any storage: the ledger alone must do
        found.problems.append(f"the checkpoints cannot be read: {error}")
        return
    if not isinstance(known, list) or not all(isinstance(facts, dict) for facts in known):
        found.problems.append("the newest checkpoint holds no records of its steps")
        return
    known = [facts for facts in known if well_formed({"kind": "steps", **facts})]
    there = {(line["attempt"], line["first"], line["last"]) for line in lines if line["kind"] == "steps"}
    for facts in known:
        if (facts["attempt"], facts["first"], facts["last"]) not in there:
            yield {"kind": "steps", **facts}


def _count(lineage: _Lineage, found: Audit) -> None:
    """How often each sample was used, by epoch, from the ids that the durable steps have taken."""
    seed, batch, size = (lineage.begin[key] for key in ("seed", "global_batch", "size"))
    skipped = lineage.skipped
    counts: dict[int, NDArray[np.int64]] = {}
    end = 0
    for line in lineage.lines:
        crc = 0
        for step in range(line["first"] - 1, line["last"]):
            places = positions(step, batch, skipped)
            ids = ids_at(places, seed, size)
            crc = zlib.crc32(ids.tobytes(), crc)
            for epoch in np.unique(places // size).tolist():
                used = counts.setdefault(epoch, np.zeros(size, dtype=np.int64))
                used += np.bincount(ids[places // size == epoch], minlength=size)
            end = int(places[-1]) + 1
        if f"{crc:08x}" != line["ids_crc"]:
            found.problems.append(
                f"steps {line['first']} to {line['last']} took other samples than the seed and the skipped windows give"
            )
    for epoch in sorted(counts):
        on_purpose = np.zeros(size, dtype=bool)
        for begin, stop in skipped:
            inside = np.arange(max(begin, epoch * size), min(stop, (epoch + 1) * size, end), dtype=np.int64)
            on_purpose[ids_at(inside, seed, size)] = True
        used, to_come = counts[epoch], max((epoch + 1) * size - end, 0)
        missing = int(((used == 0) & ~on_purpose).sum()) - to_come
        row = Epoch(
            number=epoch,
            once=int((used == 1).sum()),
            repeated=int((used > 1).sum()),
            missing=missing,
            skipped=int(on_purpose.sum()),
            to_come=to_come,
        )
        found.epochs.append(row)
        if row.repeated or row.missing:
            found.problems.append(f"epoch {epoch}: {row.repeated} samples were repeated and {row.missing} are missing")


def _compare_with_run(run: Run, written: int, found: Audit) -> None:
    """The ledger must reach as far as the run's events say: a line is written before its checkpoint is told."""
    events = run.events()
    starts = [place for place, event in enumerate(events) if event["event"] == "start"]
    turns = [place for place, event in enumerate(events) if event["event"] in ("start", "rollback")]
    saved = [event["step"] for event in events[turns[-1] :] if event["event"] == "checkpoint"] if turns else []
    if saved and max(saved) > written:
        found.problems.append(f"step {max(saved)} was saved, and the ledger ends at step {written}")
    if len(starts) > len(found.attempts):
        found.problems.append(f"{len(starts)} attempts began, and {len(found.attempts)} are in the ledger")
