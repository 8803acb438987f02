"""A run as the agent of node 0 leads it: attempt after attempt until it is done, stopped, or not worth another one."""

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
from .team import Alone

_PATIENCE_SECONDS, _REMINDER_SECONDS = 5.0, 60.0  # until it is said for whom a run waits, and until it is said again
_LOOK_SECONDS = 0.2  # between two looks for a stop signal, while nodes are missing


class Agent:
    """Runs a job on this node, and with its team on others, and starts it again where that is worth it."""

    def __init__(
        self,
        job: AgentJob,
        run_dir: Path,
        screen: Stream | LivePanel,
        *,
        team: Alone | None = None,
        environ: dict[str, str] | None = None,
    ) -> None:
        self.job, self.run_dir, self.screen = job, run_dir, screen
        self._team, self._environ = team or Alone(), environ or {}
        self._nodes = 0  # of the attempt before
        self._missing: set[int] = set()  # nodes without which it ran
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
        self._memory_fd = make_memory(self.job.nodes * self.job.nproc)
        self._team.share_memory(self._memory_fd)
        self._size = self._slots.fitting(time.monotonic())
        with SignalPipe((*STOPPING, signal.SIGCHLD)) as self._signals:
            try:
                code = self._run(starter, folder)
            finally:
                starter.close()
                os.close(self._memory_fd)
        self._team.end(code)
        return code

    def _run(self, starter: Starter, folder: Path) -> int:
        """Attempts until the end; the exit code."""
        if (ended := self._gather(self.job.join_seconds)) is not None:
            return self._never_began(ended)
        while True:
            self._outcomes.append(self._attempt(folder).run(starter))
            decision = self._decide()
            if not decision.restart:
                return self._finish(decision, None)
            if (stopped_by := self._restart(decision)) is not None:
                return self._finish(decision, stopped_by)
            if (ended := self._gather(self.job.rejoin_seconds)) is not None:
                code = ExitCode.PREEMPTED if self._outcomes[-1].failure is None else ExitCode.FAILED
                return self._finish(Decision(False, exit_code=code), ended if isinstance(ended, int) else None)
            folder = new_attempt(self.run_dir)

    def _gather(self, seconds: float) -> int | str | None:
        """Wait for the other nodes; what ends the run instead: a stop signal, or that too few are here."""
        deadline, told_at = time.monotonic() + seconds, time.monotonic() + _PATIENCE_SECONDS
        while missing := self._team.gather(min(_LOOK_SECONDS, max(deadline - time.monotonic(), 0))):
            if (number := self._asked_to_stop(0)) is not None:
                return number
            names = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            enough = self.job.nodes - len(missing) >= (self.job.min_nodes or self.job.nodes)
            if enough and set(missing) <= self._missing:
                break  # nobody waits twice for the same ones
            if time.monotonic() >= deadline:
                if enough:
                    break
                words = f"{names} of {self.job.nodes} did not come within {seconds:g} s"
                say(words)
                append_event(self.run_dir, "fault", attempt=len(self._outcomes), error=words)
                return words
            if time.monotonic() >= told_at:
                say(f"waiting for {names} of {self.job.nodes}, for another {deadline - time.monotonic():.0f} s")
                told_at = time.monotonic() + _REMINDER_SECONDS
        self._missing = set(missing)
        return None

    def _never_began(self, ended: int | str) -> int:
        """The exit code of a run whose nodes never came together."""
        code = 128 + ended if isinstance(ended, int) else int(ExitCode.FAILED)
        facts = {} if isinstance(ended, int) else {"error": ended}
        append_event(self.run_dir, "stop", exit_code=code)
        write_exit(self.run_dir, code, **facts)
        return code

    def _attempt(self, folder: Path) -> Attempt:
        placement = self._team.placement()
        before, self._nodes = self._nodes or self.job.nodes, placement.nodes
        if before != placement.nodes:
            self._sized_at = len(self._outcomes)
            self._say_resize(before * self._size, placement.nodes * self._size)
        return Attempt(
            replace(self.job, nproc=self._size, min_nproc=None),
            self.run_dir,
            folder,
            node=0,
            team=self._team,
            placement=placement,
            restarts=len(self._outcomes),
            environ=self._environ,
            screen=self.screen,
            signals=self._signals,
            memory_fd=self._memory_fd,
            resize_due=lambda: self._team.incomplete or self._slots.fitting(time.monotonic()) != self._size,
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
        self._say_resize(before, self._size)

    def _say_resize(self, before: int, ranks: int) -> None:
        outcome = self._outcomes[-1] if self._outcomes else None
        number, step = (0, 0) if outcome is None else (outcome.number + 1, outcome.next_step)
        append_event(self.run_dir, "resize", attempt=number, before=before, ranks=ranks, step=step)
        say(f"{ranks} of {self.job.nodes * self.job.nproc} ranks go on from step {step}, {before} did before")

    def _asked_to_stop(self, seconds: float) -> int | None:
        """The first stop signal within that time, if one comes."""
        deadline = time.monotonic() + seconds
        while True:
            for number in self._signals.caught():
                if number in STOPPING:
                    return number
            for message in self._team.news():
                if message.get("kind") == "signal":
                    return int(message["number"])
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            awaited = [self._signals.fd] if self._team.wake_fd is None else [self._signals.fd, self._team.wake_fd]
            select.select(awaited, [], [], left)

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
