"""How a run is stopped from outside: a signal is noted, the ranks agree on one step, and that step is saved.

Nothing happens in a signal handler but one assignment: whatever else it did could meet the code that it interrupted.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from .world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ASK_SECONDS = 0.2  # a grace is seconds, and an exchange between ranks a fraction of a millisecond
_MOST_STEPS = 1024
_SECOND_THOUGHTS_SECONDS = 1.0  # one Ctrl-C may arrive twice
RESIZE = -1  # in place of a signal's number: save and leave, for another number of ranks to go on
_REQUEST = "stop"  # file in the run's folder by which a rank tells rank 0, where no agent does


class StopSignals:
    """While entered, a stop signal is only noted; outside the main thread none is caught."""

    def __init__(self) -> None:
        self.caught = 0  # number of the first signal; 0: none yet
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self.hold()
        return self

    def hold(self) -> None:
        """Catch them, also where a library has put a handler of its own in place since."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.signal(number, self._note)
                self._before.setdefault(number, before)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            # None: it was put in place by C code, and Python cannot put it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]  # was there
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.caught:
            self.caught, self._at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._at > _SECOND_THOUGHTS_SECONDS:
            raise KeyboardInterrupt  # whoever presses Ctrl-C twice does not want to wait


class Agreement:
    """At which step all ranks stop: rank 0 says so at steps that all of them know in advance.

    The next such step comes as many steps later as take about 0.2 s by rank 0's clock. A rank that is alone asks
    nobody. A signal that reached another rank only is passed to rank 0 by the agent or, without one, by a file.
    """

    def __init__(self, world: World, share: Callable[[str], str], folder: Path) -> None:
        self._world, self._share = world, share
        self._request = folder / _REQUEST
        self._next: int | None = None  # the step at which the ranks ask next
        self._interval = 1
        self._asked, self._asked_at = 0, 0.0  # rank 0's last answer: its step and time.monotonic()
        self._told = False
        if world.first:
            self._request.unlink(missing_ok=True)  # of an earlier attempt

    def stop(self, step: int, caught: int) -> int:
        """The signal that ends the run before step `step + 1`, or RESIZE; 0: none. Call it on all ranks, every step."""
        if caught and not self._told:
            self._told = True
            self._tell(caught)
        if self._world.size == 1:
            return caught or self._asked_to_leave()
        if self._next is not None and step < self._next:
            return 0
        number, interval = map(int, self._share(self._answer(step, caught)).split())
        self._interval, self._next = interval, step + interval
        return number

    def ask_soon(self) -> None:
        """The steps begin again at an earlier one, on all ranks."""
        self._next = None

    def _tell(self, caught: int) -> None:
        """Let the agent know that the end was asked for, or rank 0."""
        if self._world.agent_fd is not None:
            self._world.tell_agent(kind="signal", number=caught)
        elif not self._world.first:
            self._request.write_text(str(caught))

    def _asked_to_leave(self) -> int:
        beat = self._world.heartbeat
        return RESIZE if beat is not None and beat.asked_to_leave else 0

    def _answer(self, step: int, caught: int) -> str:
        """Rank 0's: which signal, and how many steps to the next question."""
        if not self._world.first:
            return ""
        if not caught and self._world.agent_fd is None and self._request.exists():
            caught = signal.SIGTERM
        caught = caught or self._asked_to_leave()
        now, interval = time.monotonic(), 1
        if self._next is not None:
            seconds = (now - self._asked_at) / (step - self._asked)
            wanted = int(ASK_SECONDS / seconds) if seconds * _MOST_STEPS > ASK_SECONDS else _MOST_STEPS
            interval = max(1, min(wanted, 2 * self._interval))
        self._asked, self._asked_at = step, now
        return f"{caught:d} {interval}"
