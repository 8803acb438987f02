"""What can be seen of a run from outside, without its help: who its ranks are and where each of them is."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ..agent.records import AGENT, Process, read_record
from ..heartbeat import Heartbeats, Pulse


@dataclass(frozen=True, kw_only=True)
class Sight:
    """One attempt's ranks at one moment."""

    attempt: int
    pids: dict[int, int]
    pulses: dict[int, Pulse]

    @property
    def step(self) -> int:
        """Steps that the furthest rank has done."""
        return max(pulse.step for pulse in self.pulses.values())

    @property
    def began(self) -> int | None:
        """Step from which the attempt goes on, once a rank knows it."""
        return max((pulse.began for pulse in self.pulses.values() if pulse.began is not None), default=None)

    @property
    def finished(self) -> int:
        """Steps of this attempt."""
        return max(pulse.finished for pulse in self.pulses.values())


class Watch:
    """Looks at a run of our own agent, whose heartbeats the kernel shows to whoever may look at the process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / AGENT
        self._attempt: tuple[int, int] | None = None  # the agent's pid, and the number of its attempt
        self._beats: Heartbeats | None = None
        self._pids: dict[int, int] = {}

    def look(self) -> Sight | None:
        """The newest attempt; None while there is none whose ranks have all started."""
        record = read_record(self._path)
        if record is None or not record["ranks"]:
            return None
        agent = Process(**record["process"])
        if (attempt := (agent.pid, record["attempt"])) != self._attempt:
            if not agent.alive:
                return None
            beats = Heartbeats.of_agent(agent.pid)
            if beats is None or read_record(self._path) != record:
                return None  # the attempt has just ended
            self.close()
            self._attempt, self._beats = attempt, beats
            self._pids = {int(rank): pid for rank, pid in record["ranks"].items()}
        return self.last()

    def last(self) -> Sight | None:
        """The attempt that was seen last, also when it has ended: its ranks' memory says where they came to."""
        if self._attempt is None or self._beats is None:
            return None
        pulses = {rank: self._beats.pulse(place) for place, rank in enumerate(sorted(self._pids))}
        return Sight(attempt=self._attempt[1], pids=self._pids, pulses=pulses)

    def close(self) -> None:
        """Give up the memory of the attempt that was seen last."""
        with contextlib.ExitStack() as stack:
            if self._beats is not None:
                stack.callback(self._beats.close)
            self._beats, self._attempt = None, None
