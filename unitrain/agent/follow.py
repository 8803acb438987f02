"""A run as the agents of all nodes but the first follow it: they start ranks when told to, and end when told to."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ExitCode
from ..shared_memory import make_memory
from .attempt import Attempt
from .job import AgentJob
from .records import append_event
from .screen import Silent, say
from .signals import STOPPING, SignalPipe
from .starters import CannotFork, FirstSafe, Starter
from .team import Member, Placement


class Follower:
    """Runs the ranks of one node, as node 0 says."""

    def __init__(self, job: AgentJob, run_dir: Path, team: Member) -> None:
        self.job, self.run_dir, self._team = job, run_dir, team
        self._starter: FirstSafe | None = None
        self._said: list[dict[str, Any]] = []  # by node 0, and not yet obeyed
        self._signal: int | None = None

    def run(self, choose: Callable[[Path], Sequence[Starter]]) -> int:
        """Follow until the end; the run's exit code. Raises UserError where node 0 refuses this node.

        `choose` as in `Agent.run`.
        """
        self._memory_fd = make_memory(self.job.nodes * self.job.nproc)
        self._team.share_memory(self._memory_fd)
        with SignalPipe((*STOPPING, signal.SIGCHLD)) as self._signals:
            try:
                if not self._join(self.job.join_seconds):
                    return self._given_up(self.job.join_seconds)
                while True:
                    order = self._next_order()
                    if order["kind"] == "start":
                        self._attempt(order, choose)
                    elif order["kind"] == "end":
                        return int(order["exit_code"])
                    elif not self._join(self.job.rejoin_seconds):
                        return self._given_up(self.job.rejoin_seconds)
            finally:
                if self._starter is not None:
                    self._starter.close()
                os.close(self._memory_fd)
                self._team.leave()

    def _join(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._signal is None:
            if self._team.join(max(deadline - time.monotonic(), 0), self._signals.fd):
                return True
            self._note_signals()
            if time.monotonic() >= deadline:
                return False
        return False

    def _given_up(self, seconds: float) -> int:
        """The exit code of a node that has nobody to follow."""
        if self._signal is not None:
            return 128 + self._signal
        say(f"node {self._team.node}: the agent of node 0 does not answer for {seconds:g} s: {self._team.reason}")
        return ExitCode.FAILED

    def _next_order(self) -> dict[str, Any]:
        """Wait for `start`, `end` or `lost`."""
        while True:
            self._note_signals()
            self._said += self._team.news()
            while self._said:
                order = self._said.pop(0)
                if order.get("kind") in ("start", "end", "lost"):
                    return order
                if order.get("kind") == "asked":
                    self._team.tell(kind="behind", wrote=[], silent=[])
            select.select([self._signals.fd, self._team.fd], [], [])

    def _note_signals(self) -> None:
        """A signal that comes between attempts is for node 0 to decide on."""
        for number in self._signals.caught():
            if number in STOPPING:
                self._signal = self._signal or number
                self._team.tell(kind="signal", number=number)

    def _attempt(self, order: dict[str, Any], choose: Callable[[Path], Sequence[Starter]]) -> None:
        folder = self.run_dir / "logs" / f"attempt-{order['attempt']}"
        folder.mkdir(parents=True, exist_ok=True)
        if self._starter is None:
            self._starter = FirstSafe(choose(folder), self._refused)
        place = {name: order[name] for name in ("index", "nodes", "host", "port", "snapshot")}
        self._team.send_on(order["index"] * self.job.nproc, order["mirror"])
        attempt = Attempt(
            replace(self.job, min_nproc=None),
            self.run_dir,
            folder,
            node=self._team.node,
            team=self._team,
            placement=Placement(**place, address=self._team.address),
            restarts=order["restarts"],
            environ={},
            screen=Silent(),
            signals=self._signals,
            memory_fd=self._memory_fd,
        )
        outcome = attempt.run(self._starter)
        self._signal = outcome.signal
        if outcome.deserted:
            self._said.insert(0, {"kind": "lost"})
        else:
            self._team.tell(kind="ended", **outcome.sent, has_snapshots=self._team.has_snapshots)

    def _refused(self, refusal: CannotFork) -> None:
        append_event(self.run_dir, "fork_refused", node=self._team.node, error=str(refusal))
        say(f"note: node {self._team.node}: the ranks start as new processes, which takes longer: {refusal}")
