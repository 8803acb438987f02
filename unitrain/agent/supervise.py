"""A run on one node: attempt after attempt until it is done, stopped, or not worth another one."""

from __future__ import annotations

import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ExitCode
from .attempt import Attempt, Outcome
from .job import AgentJob
from .logs import new_attempt
from .records import EXIT, append_event, write_exit
from .report import Failure, failure_block, loop_words, next_command, restart_words
from .restart import Decision, Fault, decide, in_vain
from .screen import LivePanel, Stream, say
from .signals import STOPPING, SignalPipe
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

    def run(self, choose: Callable[[Path], Sequence[Starter]]) -> int:
        """Run attempts until one is not followed by another, and say how it went; the exit code of the run.

        `choose` gives the starters to try in turn, from the folder for logs.
        """
        folder = new_attempt(self.run_dir)
        (self.run_dir / EXIT).unlink(missing_ok=True)
        starter = FirstSafe(choose(folder), self._refused)
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
        return self._finish(decision, stopped_by)

    def _attempt(self, folder: Path) -> Attempt:
        return Attempt(
            self.job,
            self.run_dir,
            folder,
            node=self.node,
            restarts=len(self._outcomes),
            environ=self._environ,
            screen=self.screen,
            signals=self._signals,
        )

    def _refused(self, refusal: CannotFork) -> None:
        append_event(self.run_dir, "fork_refused", error=str(refusal))
        say(f"note: the ranks start as new processes, which takes longer: {refusal}")

    def _decide(self) -> Decision:
        """What follows the newest outcome. A run that was done or asked to stop is not started again."""
        outcome = self._outcomes[-1]
        if outcome.failure is None:
            return Decision(False, exit_code=_exit_code(outcome))
        facts = {"rank": outcome.failure.rank, "error": outcome.failure.error}
        append_event(self.run_dir, "fault", attempt=outcome.number, **facts)
        return decide(self._faults(), self.job.restarts)

    def _faults(self) -> list[Fault]:
        return [
            Fault(
                exit_code=outcome.failure.exit_code,
                raised=outcome.failure.spoke,
                finished=outcome.finished,
                progress=outcome.progress,
            )
            for outcome in self._outcomes
            if outcome.failure is not None
        ]

    def _restart(self, decision: Decision) -> int | None:
        """Wait as long as was decided, and say what comes; the signal that asked to stop meanwhile, if one did."""
        outcome = self._outcomes[-1]
        failure = outcome.failure
        assert failure is not None, "only a failed attempt is followed by another"
        self.screen.end_line()
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
            words = failure_block(failure, self.run_dir, log_shown=failure.rank == 0)
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
