"""The life of one node's ranks: started together, watched, and ended together."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ExitCode
from ..world import LOOPBACK
from .job import AgentJob
from .logs import GrowingFile, attempt_number, new_attempt, rank_log
from .noise import NoiseFilter
from .rank import RankStart
from .records import EXIT, append_event, hostname, write_agent, write_exit
from .report import Failure, failure_block, failure_exit_code, first_failure, next_command
from .screen import LivePanel, Stream, say
from .signals import STOPPING, SignalPipe, signal_group
from .starters import CannotFork, Ended, Started, Starter

_TICK_SECONDS = 0.05  # rank 0's log is a file, and nothing else tells that it grew
_SETTLE_SECONDS = 0.2  # from the first sign of a failure to stopping the others, so that the cause can still speak
_SAME_SIGNAL_SECONDS = 1.0  # one Ctrl-C may come twice, from the terminal and from the launcher


@dataclass
class Rank:
    """One rank as its agent sees it."""

    start: RankStart
    pipe: int  # the agent's end
    pid: int | None = None
    code: int | None = None  # how it ended; None: it has not
    spoke: bool = False  # it has told of an error
    unread: bytes = b""

    @property
    def alive(self) -> bool:
        """True until it has ended, also before it has started."""
        return self.code is None

    def messages(self) -> list[dict[str, Any]]:
        """What the rank has told since the last call."""
        try:
            while chunk := os.read(self.pipe, 65536):
                self.unread += chunk
        except BlockingIOError:
            pass
        *lines, self.unread = self.unread.split(b"\n")
        told = []
        for line in lines:
            with contextlib.suppress(ValueError):  # two threads of a rank wrote long lines at once
                told.append(json.loads(line))
        return told


class Agent:
    """Runs one attempt of a job on this node."""

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
        self.failure: Failure | None = None  # the first one, once the attempt has ended
        self._environ = environ or {}
        self._ranks: dict[int, Rank] = {}
        self._failures: list[Failure] = []
        self._signal: int | None = None  # the first that asked us to stop
        self._stopped_at: float | None = None  # when the ranks were told to stop
        self._killed = False
        self._noise = NoiseFilter()
        self._quiet_from: float = math.inf  # where rank 0's own account of its failure begins in its log

    def run(self, choose: Callable[[Path], Sequence[Starter]]) -> int:
        """Start the ranks, wait for all to end, and say how it went; the exit code of the attempt.

        `choose` gives the starters to try in turn, from the folder for logs.
        """
        self._attempt = new_attempt(self.run_dir)
        (self.run_dir / EXIT).unlink(missing_ok=True)
        with (
            SignalPipe((*STOPPING, signal.SIGCHLD)) as self._signals,
            selectors.DefaultSelector() as self._selector,
            held_port() as port,
        ):
            self._selector.register(self._signals.fd, selectors.EVENT_READ)
            self._starters = iter(choose(self._attempt))
            self._starter = next(self._starters)
            try:
                self._start(port)
                while any(rank.alive for rank in self._ranks.values()):
                    self._tick()
            finally:
                self._clear()
        return self._finish()

    def _start(self, port: int) -> None:
        write_agent(self.run_dir, attempt_number(self._attempt), {})
        for local_rank in range(self.job.nproc):
            rank = self.node * self.job.nproc + local_rank
            log = rank_log(self._attempt, rank)
            log.touch()
            pipe, agent_fd = os.pipe()
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ)
            environ = {**self._environ, **self._place(local_rank, port), "UNITRAIN_AGENT_FD": str(agent_fd)}
            self._ranks[rank] = Rank(RankStart(rank=rank, environ=environ, log=str(log), agent_fd=agent_fd), pipe)
        self._first_log = GrowingFile(rank_log(self._attempt, 0))
        self._begin()

    def _place(self, local_rank: int, port: int) -> dict[str, str]:
        """What torchrun would set."""
        job = self.job
        values = {
            "RANK": self.node * job.nproc + local_rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": job.nodes * job.nproc,
            "LOCAL_WORLD_SIZE": job.nproc,
            "GROUP_RANK": self.node,
            "GROUP_WORLD_SIZE": job.nodes,
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": port,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_RUN_ID": job.run_id,
            "UNITRAIN_ATTEMPT": attempt_number(self._attempt),
        }
        return {name: str(value) for name, value in values.items()}

    def _begin(self) -> None:
        self._starter.start([rank.start for rank in self._ranks.values()])
        self._wake_fd = self._starter.wake_fd
        if self._wake_fd is not None:
            self._selector.register(self._wake_fd, selectors.EVENT_READ)

    def _tick(self) -> None:
        """Wait for anything to happen, take note of it, and act."""
        self._selector.select(_TICK_SECONDS)
        for number in self._signals.caught():
            self._on_signal(number)
        # In this order: what a rank did before it ended is known when its end is, and a line that is announced before
        # it is printed is known to be.
        news = self._news()
        written = self._first_log.size()
        for rank in self._ranks.values():
            for message in rank.messages():
                self._on_message(rank, message)
        self.screen.text(self._noise.without_noise(self._first_log.read(min(written, self._quiet_from))))
        for event in news:
            self._on_news(event)
        self._stop_if_due()

    def _news(self) -> list[Started | Ended]:
        try:
            return self._starter.news()
        except CannotFork as refusal:
            append_event(self.run_dir, "fork_refused", error=str(refusal))
            say(f"note: the ranks start as new processes, which takes longer: {refusal}")
            if self._wake_fd is not None:
                self._selector.unregister(self._wake_fd)
            self._starter.close()
            self._starter = next(self._starters)
            self._begin()
            return []

    def _on_signal(self, number: int) -> None:
        if number not in STOPPING:
            return
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled_at = number, now
        elif now - self._signalled_at > _SAME_SIGNAL_SECONDS:
            self._kill()

    def _on_message(self, rank: Rank, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "progress":
            self.screen.progress(message)
        elif kind == "error":
            self._failed(Failure.from_message(message, rank_log(self._attempt, rank.start.rank)))
            rank.spoke = True
            if rank.start.rank == 0 and message["log_size"] is not None:
                self._quiet_from = message["log_size"]

    def _on_news(self, event: Started | Ended) -> None:
        rank = self._ranks[event.rank]
        if isinstance(event, Started):
            rank.pid = event.pid
            if self._stopped_at is not None:
                signal_group(event.pid, signal.SIGTERM)  # it missed the first one
            if all(other.pid for other in self._ranks.values()):
                pids = {number: other.pid for number, other in self._ranks.items() if other.pid}
                write_agent(self.run_dir, attempt_number(self._attempt), pids)
            return
        rank.code = event.code
        of_itself = self._stopped_at is None and not rank.spoke
        if of_itself and event.code not in (ExitCode.DONE, ExitCode.PREEMPTED):
            log = rank_log(self._attempt, event.rank)
            self._failed(Failure.from_end(event, host=hostname(), log=log, pid=rank.pid))

    def _failed(self, failure: Failure) -> None:
        if self._signal is not None:
            return  # it was asked to end, in whatever way it does
        if not self._failures:
            self._first_sign = time.monotonic()
        self._failures.append(failure)

    def _stop_if_due(self) -> None:
        """Ranks end together: when one has failed or somebody asks, the others get SIGTERM, and SIGKILL later."""
        now = time.monotonic()
        if self._stopped_at is None:
            if self._signal is not None or (self._failures and now - self._first_sign >= _SETTLE_SECONDS):
                self._stopped_at = now
                self._signal_alive(signal.SIGTERM)
        elif now - self._stopped_at > self.job.grace_seconds and not self._killed:
            self._kill()

    def _kill(self) -> None:
        self._killed = True
        self._signal_alive(signal.SIGKILL)

    def _signal_alive(self, number: int) -> None:
        for rank in self._ranks.values():
            if rank.alive and rank.pid is not None:
                signal_group(rank.pid, number)

    def _clear(self) -> None:
        """Leave no process and no descriptor behind, also after an error of our own."""
        for rank in self._ranks.values():
            if rank.pid is not None:
                signal_group(rank.pid, signal.SIGKILL)  # what a rank has started and left behind is in its group
            os.close(rank.pipe)
            os.close(rank.start.agent_fd)
        self._starter.close()

    def _finish(self) -> int:
        """Keep how it ended, and say it."""
        code = self._exit_code()
        facts: dict[str, Any] = {}
        words = ""
        if self._failures:
            self.failure = failure = first_failure(self._failures)
            facts = {"rank": failure.rank, "error": failure.error}
            words = failure_block(failure, self.run_dir, log_shown=failure.rank == 0)
            append_event(self.run_dir, "fault", **facts)
        elif self._signal is not None:
            words = f"stopped by {signal.Signals(self._signal).name}; {next_command(self.run_dir)}"
        elif code == ExitCode.PREEMPTED:
            words = f"preempted after a save; {next_command(self.run_dir)}"
        append_event(self.run_dir, "stop", exit_code=code)
        write_exit(self.run_dir, code, attempt=attempt_number(self._attempt), **facts)
        self.screen.text(self._noise.rest())
        self.screen.close()
        if words:
            say(words)
        return code

    def _exit_code(self) -> int:
        if self._failures:
            return failure_exit_code(first_failure(self._failures))
        if self._signal is not None:
            return 128 + self._signal  # as a shell counts
        preempted = any(rank.code == ExitCode.PREEMPTED for rank in self._ranks.values())
        return ExitCode.PREEMPTED if preempted else ExitCode.DONE


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free port for rank 0, which nobody else gets: held by a bound socket, on which nothing listens.

    Rank 0 may bind it too, because both set SO_REUSEADDR and only one of them listens.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]
