"""A run on one node: attempt after attempt until it is done, stopped, or not worth another one."""

from __future__ import annotations

import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ExitCode
from ..shared_memory import make_memory
from ..world import environment
from .attempt import Attempt, Outcome
from .job import AgentJob
from .logs import new_attempt
from .records import EXIT, append_event, write_exit
from .report import Failure, failure_block, keep_capsule, loop_words, next_command, restart_words
from .restart import Decision, Fault, decide, in_vain
from .screen import LivePanel, Stream, say
from .signals import STOPPING, SignalPipe
from .slots import Slots, starts_fail
from .starters import CannotFork, FirstSafe, Starter


class Agent:
    """Runs a job on this node and starts it again where that is worth it."""

    def __init__(
        self,
        job: AgentJob,
        run_dir: Path,
        screen: Stream | LivePanel,
        *,
        node: int = 0,
        environ: dict[str, str] | None = None,
    ) -> None:
        self.job, self.run_dir, self.screen, self.node = job, run_dir, screen, node
        self._environ = environ or {}
        self._outcomes: list[Outcome] = []
        self._capsule: Path | None = None  # of the newest failure
        self._slots = Slots(run_dir, least=job.min_nproc or job.nproc, most=job.nproc)
        self._size = job.nproc  # ranks of the attempt
        self._sized_at = 0  # attempts before it has had this size

    def run(self, choose: Callable[[Path], Sequence[Starter]]) -> int:
        """Run attempts until one is not followed by another, and say how it went; the exit code of the run.

        `choose` gives the starters to try in turn, from the folder for logs.
        """
        folder = new_attempt(self.run_dir)
        (self.run_dir / EXIT).unlink(missing_ok=True)
        starter = FirstSafe(choose(folder), self._refused)
        self._memory_fd = make_memory(self.job.nproc)
        self._size = self._slots.fitting(time.monotonic())
        with SignalPipe((*STOPPING, signal.SIGCHLD)) as self._signals:
            try:
                while True:
                    self._outcomes.append(self._attempt(folder).run(starter))
                    decision = self._decide()
                    stopped_by = self._restart(decision) if decision.restart else None
                    if not decision.restart or stopped_by is not None:
                        break
                    folder = new_attempt(self.run_dir)
            finally:
                starter.close()
                os.close(self._memory_fd)
        return self._finish(decision, stopped_by)

    def _attempt(self, folder: Path) -> Attempt:
        return Attempt(
            replace(self.job, nproc=self._size, min_nproc=None),
            self.run_dir,
            folder,
            node=self.node,
            restarts=len(self._outcomes),
            environ=self._environ,
            screen=self.screen,
            signals=self._signals,
            memory_fd=self._memory_fd,
            resize_due=lambda: self._slots.fitting(time.monotonic()) != self._size,
        )

    def _refused(self, refusal: CannotFork) -> None:
        append_event(self.run_dir, "fork_refused", error=str(refusal))
        say(f"note: the ranks start as new processes, which takes longer: {refusal}")

    def _decide(self) -> Decision:
        """What follows the newest outcome. A run that was done or asked to stop is not started again."""
        outcome = self._outcomes[-1]
        if outcome.resized:
            return Decision(True)
        if outcome.failure is None:
            return Decision(False, exit_code=_exit_code(outcome))
        facts: dict[str, Any] = {"rank": outcome.failure.rank, "error": outcome.failure.error}
        self._capsule = self._keep(outcome, outcome.failure)
        if self._capsule is not None:
            facts["capsule"] = str(self._capsule.relative_to(self.run_dir))
        append_event(self.run_dir, "fault", attempt=outcome.number, **facts)
        faults = self._faults()
        if self.job.restarts and starts_fail(faults) and self._slots.lose(time.monotonic()):
            return Decision(True)
        return decide(faults, self.job.restarts)

    def _keep(self, outcome: Outcome, failure: Failure) -> Path | None:
        """All that is known of the failure, in a folder of its own."""
        # What a hung rank did after it was woken for its stacks is not where it hung.
        step = None if failure.account else failure.step or outcome.step
        return keep_capsule(failure, self.run_dir, environment() | self._environ, attempt=outcome.number, step=step)

    def _faults(self) -> list[Fault]:
        """Of the attempts since the number of ranks changed: that may be what mends it."""
        return [
            Fault(
                rank=outcome.failure.rank,
                exit_code=outcome.failure.exit_code,
                raised=outcome.failure.spoke,
                finished=outcome.finished,
                retry=outcome.failure.retry,
                progress=outcome.progress,
            )
            for outcome in self._outcomes[self._sized_at :]
            if outcome.failure is not None
        ]

    def _restart(self, decision: Decision) -> int | None:
        """Wait as long as was decided, and say what comes; the signal that asked to stop meanwhile, if one did."""
        outcome = self._outcomes[-1]
        failure = outcome.failure
        self.screen.end_line()
        self._resize(outcome)
        if failure is None:
            return None
        say(restart_words(failure, len(self._outcomes), outcome.next_step, decision.after_seconds))
        if (number := self._asked_to_stop(decision.after_seconds)) is not None:
            return number
        append_event(
            self.run_dir,
            "restart",
            attempt=outcome.number + 1,
            rank=failure.rank,
            error=failure.error,
            step=outcome.next_step,
            seconds=round(time.monotonic() - outcome.failed_at, 3),
        )
        return None

    def _resize(self, outcome: Outcome) -> None:
        """Take as many ranks as there are slots now."""
        before, self._size = self._size, self._slots.fitting(time.monotonic())
        if self._size == before:
            return
        self._sized_at = len(self._outcomes)
        facts = {"attempt": outcome.number + 1, "before": before, "ranks": self._size, "step": outcome.next_step}
        append_event(self.run_dir, "resize", **facts)
        say(f"{self._size} of {self.job.nproc} ranks go on from step {outcome.next_step}, {before} did before")

    def _asked_to_stop(self, seconds: float) -> int | None:
        """The first stop signal within that time, if one comes."""
        deadline = time.monotonic() + seconds
        while True:
            for number in self._signals.caught():
                if number in STOPPING:
                    return number
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            select.select([self._signals.fd], [], [], left)

    def _finish(self, decision: Decision, stopped_by: int | None) -> int:
        """Keep how it ended, and say it."""
        outcome = self._outcomes[-1]
        code: int = decision.exit_code if stopped_by is None else 128 + stopped_by
        facts: dict[str, Any] = {}
        failure = outcome.failure if stopped_by is None else None
        if failure is not None:
            facts = {"rank": failure.rank, "error": failure.error}
            words = failure_block(failure, self.run_dir, log_shown=failure.rank == 0, capsule=self._capsule)
            if code == ExitCode.CRASH_LOOP:
                words = f"{loop_words(self._loop())}\n{words}"
        else:
            words = self._parting(outcome.signal if stopped_by is None else stopped_by, code)
        append_event(self.run_dir, "stop", exit_code=code)
        write_exit(self.run_dir, code, attempt=outcome.number, **facts)
        self.screen.close()
        if words:
            say(words)
        return code

    def _loop(self) -> Counter[tuple[int, str]]:
        """Rank and error of each attempt that came to nothing, and how often."""
        failures: list[Failure] = [outcome.failure for outcome in self._outcomes if outcome.failure is not None]
        return Counter((failure.rank, failure.error) for failure in failures[-in_vain(self._faults()) :])

    def _parting(self, number: int | None, code: int) -> str:
        if code == ExitCode.DONE:
            return ""
        saved = code == ExitCode.PREEMPTED
        if number is None:
            return f"preempted after a save; {next_command(self.run_dir)}"
        how = f"stopped by {signal.Signals(number).name}{' after a save' if saved else ''}"
        return f"{how}; {next_command(self.run_dir)}"


def _exit_code(outcome: Outcome) -> int:
    """That of an attempt in which nothing failed."""
    codes = set(outcome.codes.values())
    if codes == {ExitCode.DONE}:
        return ExitCode.DONE
    if outcome.signal is None or codes == {ExitCode.PREEMPTED}:
        return ExitCode.PREEMPTED
    return 128 + outcome.signal  # as a shell counts
