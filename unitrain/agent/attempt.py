"""The life of the ranks of one attempt on one node: started together, watched, and ended together."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ExitCode
from ..heartbeat import Heartbeats, Phase
from ..world import environment
from .hang import Watch, stacks_file, write_stacks
from .interfaces import interface_of
from .job import AgentJob
from .logs import GrowingFile, attempt_number, rank_log
from .noise import NoiseFilter
from .rank import RankStart
from .records import append_event, hostname, write_agent
from .report import Failure, first_failure
from .screen import LivePanel, Stream
from .signals import STOPPING, SignalPipe, signal_group
from .starters import Ended, Started, Starter
from .team import Alone, Placement
from .watched import Rank

_TICK_SECONDS = 0.05  # rank 0's log is a file, and nothing else tells that it grew
_SETTLE_SECONDS = 0.2  # from the first sign of a failure to ending the others, so that the cause can still speak
_INQUIRY_SECONDS = 5.0  # in which every node says which of its ranks is slowest
_SAME_SIGNAL_SECONDS = 1.0  # one Ctrl-C may come twice, from the terminal and from the launcher


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended, as far as this node saw it."""

    number: int
    codes: Mapping[int, int]  # rank -> how its process ended
    failure: Failure | None  # the first one
    step: int | None  # of the rank that failed: the one it was in; None: it had not begun
    failed_at: float  # when its first sign was seen, time.monotonic()
    signal: int | None  # the first that asked the run to stop
    resized: bool  # all ranks saved and left because another number of them is to go on
    finished: int  # steps
    began: int | None  # step from which it went on; None: it did not come so far
    saved: int | None  # newest step that it made durable
    steps: Mapping[int, int | None] = field(default_factory=dict)  # rank -> the one it was in
    deserted: bool = False  # the agent of node 0 was lost meanwhile

    @property
    def sent(self) -> dict[str, Any]:
        """As the agent of another node tells it to that of node 0."""
        facts = {"finished": self.finished, "began": self.began, "saved": self.saved}
        return {"codes": dict(self.codes), "steps": dict(self.steps), **facts}

    @property
    def progress(self) -> bool:
        """True when it has left a newer checkpoint than it started from."""
        return self.saved is not None and self.saved > (self.began or 0)

    @property
    def next_step(self) -> int:
        """From where another attempt goes on."""
        return max(self.saved or 0, self.began or 0)


@dataclass
class _Inquiry:
    """Which rank holds up all others: every node is asked for its slowest."""

    waits_for: set[int]  # nodes
    until: float
    answers: list[dict[str, Any]] = field(default_factory=list)

    def answered(self, message: dict[str, Any]) -> None:
        self.waits_for.discard(message["node"])
        self.answers.append(message)

    @property
    def blamed(self) -> dict[str, Any] | None:
        """The answer of the node whose rank it is."""
        return min((answer for answer in self.answers if "blame" in answer), key=_blame, default=None)

    def ranks(self, kind: str) -> list[int]:
        return sorted(rank for answer in self.answers for rank in answer[kind])


def _blame(answer: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(answer["blame"])


class Attempt:
    """Runs the ranks of one attempt on this node."""

    def __init__(
        self,
        job: AgentJob,
        run_dir: Path,
        folder: Path,
        *,
        node: int,
        restarts: int,
        environ: Mapping[str, str],
        screen: Stream | LivePanel,
        signals: SignalPipe,
        memory_fd: int,
        resize_due: Callable[[], bool] = lambda: False,
        team: Alone | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.job, self.run_dir, self.screen = job, run_dir, screen
        self._folder, self._number = folder, attempt_number(folder)
        self._node, self._restarts, self._environ = node, restarts, environ
        self._team, self._placement = team or Alone(), placement or Placement()
        self._inquiry: _Inquiry | None = None
        self._signals, self._memory_fd = signals, memory_fd
        self._resize_due, self._resizing = resize_due, False
        self._ranks: dict[int, Rank] = {}
        self._failures: list[Failure] = []
        self._watch = Watch(job.hang_seconds)
        self._signal: int | None = None  # the first that asked us to stop
        self._stopped_at: float | None = None  # when the ranks were told to stop
        self._killed = self._deserted = False
        self._overdue_told = -math.inf
        self._quiet_from: float = math.inf  # where rank 0's own account of its failure begins in its log
        self._settle_seconds = 0.0
        self._first_sign = 0.0

    def run(self, starter: Starter) -> Outcome:
        """Start the ranks and wait until all have ended."""
        job = self.job
        with (
            selectors.DefaultSelector() as self._selector,
            contextlib.closing(Heartbeats(job.nproc)) as self._heartbeats,
            contextlib.nullcontext(self._placement.port) if self._placement.port else held_port() as port,
        ):
            self._selector.register(self._signals.fd, selectors.EVENT_READ)
            if self._team.wake_fd is not None:
                self._selector.register(self._team.wake_fd, selectors.EVENT_READ)
            self._starter = starter
            self._wake_fd: int | None = None
            try:
                found = self._team.begin(attempt=self._number, restarts=self._restarts, port=port)
                self._snapshot = found or self._placement.snapshot
                self._start(port)
                while any(rank.alive for rank in self._ranks.values()) or self._team.waiting:
                    self._tick()
                self.screen.text(self._noise.rest())
            finally:
                self._clear()
            return self._outcome()

    def _start(self, port: int) -> None:
        write_agent(self.run_dir, self._number, {}, node=self._node)
        for local_rank in range(self.job.nproc):
            rank = self._first_rank + local_rank
            log = rank_log(self._folder, rank)
            log.touch()
            pipe, agent_fd = os.pipe()
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ)
            start = RankStart(
                rank=rank,
                environ={**self._environ, **self._place(local_rank, port)},
                log=str(log),
                agent_fd=agent_fd,
                heartbeat_fd=self._heartbeats.fd,
                memory_fd=self._memory_fd,
                slot=local_rank,
            )
            self._ranks[rank] = Rank(start, pipe)
        self._first_log, self._noise = GrowingFile(rank_log(self._folder, self._first_rank)), NoiseFilter()
        self._starter.start([rank.start for rank in self._ranks.values()])
        self._listen()

    def _place(self, local_rank: int, port: int) -> dict[str, str]:
        """What torchrun would set."""
        job, placement = self.job, self._placement
        rank = self._first_rank + local_rank
        values = {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": placement.nodes * job.nproc,
            "LOCAL_WORLD_SIZE": job.nproc,
            "GROUP_RANK": placement.index,
            "GROUP_WORLD_SIZE": placement.nodes,
            "MASTER_ADDR": placement.host,
            "MASTER_PORT": port,
            "TORCHELASTIC_RESTART_COUNT": self._restarts,
            "TORCHELASTIC_RUN_ID": job.run_id,
            "UNITRAIN_ATTEMPT": self._number,
            "UNITRAIN_STACKS": stacks_file(self._folder, rank).absolute(),
            "UNITRAIN_SNAPSHOT": self._snapshot,
        }
        return {name: str(value) for name, value in values.items()} | self._interface()

    @property
    def _first_rank(self) -> int:
        """Of this node."""
        return self._placement.index * self.job.nproc

    def _interface(self) -> dict[str, str]:
        """By which Gloo reaches the other nodes: unless told, it takes what the host's own name leads to."""
        if self._placement.address is None or (name := interface_of(self._placement.address)) is None:
            return {}
        wanted = {"GLOO_SOCKET_IFNAME": name, "HOROVOD_GLOO_IFACE": name}
        return {key: value for key, value in wanted.items() if key not in environment()}

    def _listen(self) -> None:
        """Wake up for news of the starter, which may be another one after a refusal."""
        if self._wake_fd != self._starter.wake_fd:
            if self._wake_fd is not None:
                with contextlib.suppress(KeyError, ValueError):  # closed by the starter that refused
                    self._selector.unregister(self._wake_fd)
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
        news = self._starter.news()
        self._listen()
        written = self._first_log.size()
        for rank in self._ranks.values():
            for message in rank.messages():
                self._on_message(rank, message)
        self.screen.text(self._noise.without_noise(self._first_log.read(min(written, self._quiet_from))))
        for event in news:
            self._on_news(event)
        for message in self._team.news():
            self._on_word(message)
        self._look_for_hang()
        self._resize_if_due()
        self._stop_if_due()

    def _on_signal(self, number: int) -> None:
        if number not in STOPPING:
            return
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled_at = number, now
            self._team.tell(kind="signal", number=number)
        elif number == signal.SIGINT and now - self._signalled_at > _SAME_SIGNAL_SECONDS:
            self._kill()  # whoever presses Ctrl-C twice does not want to wait; a scheduler may well repeat itself

    def _on_word(self, message: dict[str, Any]) -> None:
        """What another node's agent says."""
        kind = message.get("kind")
        if kind == "signal":
            if self._signal is None:
                self._on_signal(message["number"])  # which tells all others
        elif kind == "failure":
            self._failed(Failure.received(message["failure"], self.run_dir))
        elif kind == "kill":
            self._kill()
        elif kind == "overdue":
            self._inquire()
        elif kind == "asked":
            self._answer()
        elif kind == "behind" and self._inquiry is not None:
            self._inquiry.answered(message)
        elif kind == "lost" and self._team.leads:
            log = rank_log(self._folder, message["first_rank"])
            why = {"host": message["host"], "why": message["why"]}
            self._failed(Failure.from_lost_node(message["node"], **why, rank=message["first_rank"], log=log))
        elif kind == "lost":
            self._deserted = True
            self._kill()

    def _on_message(self, rank: Rank, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "progress":
            self.screen.progress(message)
        elif kind == "signal":
            self._on_signal(message["number"])  # it came to one rank; all must know
        elif kind == "error":
            self._failed(Failure.from_message(message, rank_log(self._folder, rank.start.rank)))
            rank.spoke = True
            if rank.start.rank == 0 and message["log_size"] is not None:
                self._quiet_from = message["log_size"]

    def _on_news(self, event: Started | Ended) -> None:
        rank = self._ranks[event.rank]
        if isinstance(event, Started):
            rank.pid = event.pid
            if self._killed:
                signal_group(event.pid, signal.SIGKILL)
            elif self._stopped_at is not None:
                signal_group(event.pid, signal.SIGTERM)  # it missed the first one
            if all(other.pid for other in self._ranks.values()):
                pids = {number: other.pid for number, other in self._ranks.items() if other.pid}
                write_agent(self.run_dir, self._number, pids, node=self._node)
            return
        rank.code = event.code
        of_itself = self._stopped_at is None and not rank.spoke and not self._killed
        if of_itself and event.code not in (ExitCode.DONE, ExitCode.PREEMPTED):
            log = rank_log(self._folder, event.rank)
            self._failed(Failure.from_end(event, host=hostname(), log=log, pid=rank.pid))

    def _failed(self, failure: Failure) -> None:
        if self._signal is not None:
            return  # it was asked to end, in whatever way it does
        if not self._failures:
            self._first_sign = time.monotonic()
        self._failures.append(failure)
        if not self._team.leads:
            self._team.tell(kind="failure", failure=failure.sent(self.run_dir))
        # No rank is killed from outside because another one failed: such a failure is the cause, and has no words.
        self._settle_seconds = 0.0 if failure.exit_code == -signal.SIGKILL or failure.hung else _SETTLE_SECONDS

    def _look_for_hang(self) -> None:
        """A rank that gets on no more is a failure, once all ranks have said where they are."""
        if self._failures or self._signal is not None:
            return
        now, pids = time.monotonic(), self._pids
        for number in pids:
            self._watch.look(number, self._heartbeats.pulse(self._ranks[number].start.slot), now)
        if self._inquiry is not None:
            self._conclude(self._inquiry, now)
        elif self._watch.hang(pids, pids, now) is not None:
            self._inquire()

    def _inquire(self) -> None:
        """Find out which rank of all nodes holds up the others: the least of what each node says of its own ranks."""
        if not self._team.leads:
            if self._overdue_told < time.monotonic() - _INQUIRY_SECONDS:
                self._overdue_told = time.monotonic()
                self._team.tell(kind="overdue")
        elif self._inquiry is None:
            self._team.tell(kind="asked")
            self._inquiry = _Inquiry(waits_for=set(self._team.waiting), until=time.monotonic() + _INQUIRY_SECONDS)
            self._inquiry.answered({"node": self._node, **self._slowest()})

    def _answer(self) -> None:
        self._team.tell(kind="behind", **self._slowest())

    def _slowest(self) -> dict[str, Any]:
        """Which rank of this node is to blame if one is, once all of them have said where they are."""
        pids = self._pids
        hang = self._watch.slowest(pids, pids, time.monotonic())
        wrote = write_stacks(self._folder, pids)
        told: dict[str, Any] = {"wrote": wrote, "silent": [rank for rank in pids if rank not in wrote]}
        if hang is None:
            return told
        log, stacks = rank_log(self._folder, hang.rank), stacks_file(self._folder, hang.rank)
        failure = Failure.from_hang(hang, host=hostname(), log=log, pid=pids[hang.rank], stacks=stacks)
        facts = {"rank": hang.rank, "step": hang.step, "seconds": round(hang.seconds, 3), "stopped": hang.stopped}
        return {**told, "blame": hang.blame, "failure": failure.sent(self.run_dir), "facts": facts}

    def _conclude(self, inquiry: _Inquiry, now: float) -> None:
        """Blame one, when all nodes have answered or have had the time to."""
        if inquiry.waits_for and now < inquiry.until:
            return
        if (blamed := inquiry.blamed) is None:
            self._inquiry = None  # every rank has ended meanwhile
            return
        wrote, silent = inquiry.ranks("wrote"), inquiry.ranks("silent")
        stacks = [str(stacks_file(self._folder, rank).relative_to(self.run_dir)) for rank in wrote]
        append_event(self.run_dir, "hang", attempt=self._number, **blamed["facts"], stacks=stacks, no_stacks=silent)
        self._failed(replace(Failure.received(blamed["failure"], self.run_dir), at=0))  # nothing failed before it

    def _resize_if_due(self) -> None:
        """Once every rank is in its steps, and so knows from where another group would go on."""
        if self._resizing or self._failures or self._signal is not None or not self._resize_due():
            return
        if all(self._heartbeats.pulse(rank.start.slot).finished for rank in self._ranks.values()):
            self._resizing = True
            self._heartbeats.ask_to_leave()

    def _stop_if_due(self) -> None:
        """When one has failed, the others wait for it in vain and are killed; who is asked to stop may save first."""
        now = time.monotonic()
        if self._signal is not None and not self._failures:
            if self._stopped_at is None:
                self._stopped_at = now
                self._signal_alive(signal.SIGTERM)
            elif now - self._stopped_at > self.job.grace_seconds and not self._killed:
                self._kill()
        elif self._failures and not self._killed and now - self._first_sign >= self._settle_seconds:
            self._kill()

    def _kill(self) -> None:
        if not self._killed:
            self._killed = True
            if self._team.leads:
                self._team.tell(kind="kill")
        self._signal_alive(signal.SIGKILL)

    @property
    def _pids(self) -> dict[int, int]:
        """Rank -> process, of those that run."""
        return {number: rank.pid for number, rank in self._ranks.items() if rank.alive and rank.pid is not None}

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
        for number in self._ranks:
            stacks = stacks_file(self._folder, number)
            with contextlib.suppress(FileNotFoundError):
                if stacks.stat().st_size == 0:  # nobody asked
                    stacks.unlink()

    def _step_of(self, number: int) -> int | None:
        """The step that a rank was in by its last beat, from 1."""
        pulse = self._heartbeats.pulse(self._ranks[number].start.slot)
        return None if not pulse.beats or pulse.phase == Phase.STARTING else pulse.step + (pulse.phase == Phase.STEP)

    def _outcome(self) -> Outcome:
        pulses = [self._heartbeats.pulse(rank.start.slot) for rank in self._ranks.values()]
        own = {
            "codes": {number: rank.code for number, rank in self._ranks.items() if rank.code is not None},
            "steps": {number: self._step_of(number) for number in self._ranks},
            "finished": max(pulse.finished for pulse in pulses),
            "began": max((pulse.began for pulse in pulses if pulse.began is not None), default=None),
            "saved": max((pulse.saved for pulse in pulses if pulse.saved is not None), default=None),
        }
        parts = [own, *self._team.ended.values()]
        codes = {int(number): code for part in parts for number, code in part["codes"].items()}
        steps = {int(number): step for part in parts for number, step in part["steps"].items()}
        left = set(codes.values()) == {ExitCode.PREEMPTED} and not self._failures and self._signal is None
        failure = first_failure(self._failures) if self._failures else None
        return Outcome(
            number=self._number,
            codes=codes,
            resized=self._resizing and left,
            failure=failure,
            step=None if failure is None else steps.get(failure.rank),
            steps=steps,
            deserted=self._deserted,
            failed_at=self._first_sign,
            signal=self._signal,
            finished=max(part["finished"] for part in parts),
            began=max((part["began"] for part in parts if part["began"] is not None), default=None),
            saved=max((part["saved"] for part in parts if part["saved"] is not None), default=None),
        )


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free port for rank 0, which nobody else gets: held by a bound socket, on which nothing listens.

    Rank 0 may bind it too, because both set SO_REUSEADDR and only one of them listens.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]
