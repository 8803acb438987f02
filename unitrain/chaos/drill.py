"""Two runs of one recipe, the second disturbed: faults come when they are due, and are followed to the next step."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..agent.records import EXIT, read_record
from ..errors import ExitCode, UnitrainError
from ..recipe import Recipe
from ..run import Run
from ..submission import start_beside
from .disk import Disk
from .faults import Fault, FullDisk
from .plan import Plan
from .watch import Sight, Watch

_TICK_SECONDS = 0.001
_GRACE_SECONDS = 30.0
_SPARE_BYTES = 16 << 20  # of the disk that can be filled


@dataclass
class Trouble:
    """One fault and what came of it. Seconds count from the fault."""

    fault: Fault
    happened: str = ""  # empty: it never did
    attempt: int = -1  # in which it happened
    step: int = 0  # steps that were done by then
    redone: int | None = None  # steps that came a second time
    seconds: float | None = None  # to the end of the first step afterwards
    new_seconds: float | None = None  # to the end of the first step that had not been done before
    error: str = ""
    at: float = 0.0  # time.monotonic()
    num_events: int = 0  # of the run, before it

    @property
    def survived(self) -> bool:
        """True when it happened and the run went on as it must."""
        return bool(self.happened) and not self.error

    @property
    def verdict(self) -> str:
        """In a few words."""
        return "recovered" if self.survived else f"failed: {self.error or 'it never came'}"


class Drill:
    """A run under way, and the faults that it is to survive."""

    def __init__(self, plan: Plan, folder: Path, disk: Disk | None, say: Callable[[str], None]) -> None:
        self.troubles = [Trouble(fault) for fault in plan.faults]
        self.run = Run.create(folder, plan.recipe)
        self.checkpoints = self.run.checkpoints(plan.recipe)
        self.damaged = ""  # folder of the checkpoint that a fault has damaged
        self._recipe, self._disk, self._say = plan.recipe, disk, say
        self._pending = list(self.troubles)
        self._open: Trouble | None = None  # the ranks have ended by it, or will
        self._full: Trouble | None = None  # the disk is

    @property
    def disk(self) -> Disk:
        """The one that can be filled."""
        assert self._disk is not None, "made where a fault needs it"
        return self._disk

    def go(self, patience_seconds: float) -> int:
        """Run to the end, through all faults; the exit code of the last job. Nothing new for so long ends it."""
        self._watch = Watch(self.run.folder)
        with contextlib.closing(self._watch):
            resumes = 0
            while True:
                code = self._job(patience_seconds)
                if code != ExitCode.PREEMPTED or resumes > len(self.troubles):
                    break
                resumes += 1
                trouble = self._open
                words = trouble.fault.before_resume(self) if trouble is not None else "resumed"
                if trouble is not None and words:
                    trouble.happened += f", {words}"
            self._settle(code)
            return code

    def _job(self, patience_seconds: float) -> int:
        """One job of the run, from its start to its exit code."""
        with started(self.run, self._recipe) as self.process:
            seen: tuple[int, int, int] | None = None
            changed = time.monotonic()
            while (code := self.process.poll()) is None:
                sight = self._watch.look()
                if sight is not None:
                    self._look(sight)
                    if seen != (now := (sight.attempt, sight.step, sight.finished)):
                        seen, changed = now, time.monotonic()
                if time.monotonic() - changed > patience_seconds:
                    self._blame(f"nothing happened for {patience_seconds:g} s")
                    return ExitCode.FAILED
                time.sleep(_TICK_SECONDS)
        return code

    def _look(self, sight: Sight) -> None:
        self._follow_all(sight)
        saves = self._num_saves()
        for trouble in list(self._pending):
            busy = self._full if trouble.fault.keeps_running else self._open
            if busy is None and trouble.fault.due(sight, saves):
                self._inject(trouble, sight)

    def _follow_all(self, sight: Sight) -> None:
        if self._open is not None:
            self._follow(self._open, sight)
        if self._full is not None:
            self._follow_full_disk(self._full, sight)

    def _num_saves(self) -> int:
        """That have ended; counted only where a fault waits for one, for a long run has many events."""
        if not any(trouble.fault.keeps_running for trouble in self._pending):
            return 0
        return sum(event["event"] in ("checkpoint", "checkpoint_failed") for event in self.run.events())

    def _inject(self, trouble: Trouble, sight: Sight) -> None:
        self._pending.remove(trouble)
        trouble.num_events, trouble.at = len(self.run.events()), time.monotonic()
        trouble.attempt, trouble.step = sight.attempt, sight.step
        try:
            trouble.happened = trouble.fault.inject(self, sight)
        except ProcessLookupError:
            trouble.error = "the rank had ended before it"
        else:
            if trouble.fault.keeps_running:
                self._full = trouble
            else:
                self._open = trouble
        self._say(f"{trouble.fault}: {trouble.happened or trouble.error} after step {trouble.step}")

    def _follow(self, trouble: Trouble, sight: Sight) -> None:
        """Until the run has come further than it was."""
        if sight.attempt == trouble.attempt:
            trouble.step = max(trouble.step, sight.step)  # a step that was under way may still have ended
            return
        if sight.began is None:
            return
        elapsed = time.monotonic() - trouble.at
        if trouble.redone is None:
            trouble.redone = max(trouble.step - sight.began, 0)
        if trouble.seconds is None and sight.finished:
            trouble.seconds = elapsed
        if sight.began + sight.finished > trouble.step:
            trouble.new_seconds = elapsed
            self._close(trouble)

    def _follow_full_disk(self, trouble: Trouble, sight: Sight) -> None:
        """Until a save has failed, the run has gone on, and a later save has not failed."""
        since = self._since(trouble)
        failed = next((event for event in since if event["event"] == "checkpoint_failed"), None)
        if failed is None:
            return
        self.disk.free()
        if trouble.redone is None:
            trouble.redone, trouble.step = 0, failed["step"]
            trouble.happened = "no room for the save"
        if trouble.seconds is None and sight.step > failed["step"]:
            trouble.seconds = trouble.new_seconds = max(time.time() - failed["time"], 0.0)
        saved = any(event["event"] == "checkpoint" and event["step"] > failed["step"] for event in since)
        if saved and trouble.seconds is not None:
            self._close(trouble)

    def _since(self, trouble: Trouble) -> list[dict[str, Any]]:
        return self.run.events()[trouble.num_events :]

    def _close(self, trouble: Trouble) -> None:
        trouble.error = trouble.error or trouble.fault.complaint(self, self._since(trouble))
        if trouble is self._full:
            self._full = None
        else:
            self._open = None
        redone = "" if trouble.redone is None else f", steps redone: {trouble.redone}"
        self._say(f"{trouble.fault}: {trouble.verdict}{redone}")

    def _settle(self, code: int) -> None:
        """What the run's end says of the faults that are still open."""
        last = self._watch.last()
        if code == ExitCode.DONE and last is not None:
            self._follow_all(last)
        self._blame("the run ended before it had gone on" if code == ExitCode.DONE else _reason(self.run, code))

    def _blame(self, reason: str) -> None:
        for trouble in (self._open, self._full):
            if trouble is not None:
                trouble.error = trouble.error or reason
                self._close(trouble)


def undisturbed(recipe: Recipe, folder: Path) -> Run:
    """Train the recipe in peace. Raises UnitrainError where even that fails."""
    run = Run.create(folder, recipe)
    with started(run, recipe) as process:
        code = process.wait()
    if code != ExitCode.DONE:
        raise UnitrainError(f"the run fails undisturbed: {_reason(run, code)}; see {folder}/logs")
    return run


def disk_for(plan: Plan, reference: Run, folder: Path) -> Disk | None:
    """A disk of its own for the checkpoints of the run to come in `folder`, where a fault is to fill it."""
    if not any(isinstance(fault, FullDisk) for fault in plan.faults):
        return None
    kept = Path(reference.checkpoints(plan.recipe))
    largest = max(sum(file.stat().st_size for file in path.iterdir()) for path in kept.iterdir() if path.is_dir())
    # those that are kept, one that is damaged, one that is being written, and one that was given up
    return Disk(folder / "checkpoints", (plan.recipe.checkpoint.keep + 4) * 2 * largest + _SPARE_BYTES)


@contextlib.contextmanager
def started(run: Run, recipe: Recipe) -> Iterator[subprocess.Popen[bytes]]:
    """A job of the run by our own agent, away from our terminal; it ends with us."""
    process = start_beside(run, recipe)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _reason(run: Run, code: int) -> str:
    said = (read_record(run.folder / EXIT) or {}).get("error") or ""
    return f"exit code {code}{': ' if said else ''}{said.splitlines()[0] if said else ''}"
