"""Signals as bytes in a pipe, so that one loop waits for them and for everything else."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import TracebackType

# USR1 and USR2: schedulers announce the end of a job by them
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class SignalPipe:
    """While entered, signals only make `fd` readable; outside the main thread none are caught."""

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        self._signals = signals
        self._before: dict[int, object] = {}

    def __enter__(self) -> SignalPipe:
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)
        if threading.current_thread() is threading.main_thread():
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, _ignore) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned
            signal.set_wakeup_fd(self._wakeup)
        os.close(self.fd)
        os.close(self._write)

    def caught(self) -> list[int]:
        """The signals that came since the last call."""
        with contextlib.suppress(BlockingIOError):
            return list(os.read(self.fd, 4096))
        return []


def signal_group(pid: int, number: int) -> None:
    """Signal a process that leads a group, and all of the group. One that is gone already is no error."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # also in the moment between its start and its setsid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _ignore(number: int, frame: object) -> None:
    """The wake-up pipe says it all; a handler must be there for it to be written."""
