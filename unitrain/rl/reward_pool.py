"""Where reward functions run: worker processes, one call at a time each, killed and replaced at a time limit.

A function that a worker can import (a path "module:function", or a function at the top of a module) runs in a fresh
interpreter. Any other (a lambda, a method, one of a notebook) runs in a fork of this process, which has all it had.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import json
import math
import multiprocessing
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, did_you_mean
from ..registry import resolve
from . import reward_worker

_READ = 1 << 16
_END_SECONDS = 5.0  # for a process that closed its connection
_START_SECONDS = 60.0  # for a worker's start: its imports are not the function's time

_Wait = Callable[[float | None], int | None]  # so many seconds at most; the exit code, None: it lives


class Call:
    """A reward function as workers find and call it. Raises UserError for one that cannot be called."""

    def __init__(self, name: str, function: Callable[..., Any] | str) -> None:
        self.name = name
        self.path, self.function = _found(name, function)
        parameters = inspect.signature(self.function).parameters.values()
        if any(each.kind is inspect.Parameter.POSITIONAL_ONLY for each in parameters):
            raise UserError(f"the reward function {name!r} has positional-only parameters; it is called with keywords")
        named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.needs = {each.name: each.default is inspect.Parameter.empty for each in parameters if each.kind in named}
        self.takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)

    def keywords(self, offered: dict[str, Any]) -> dict[str, Any]:
        """What the function is called with. Raises UserError for a name that it needs and nobody offers."""
        for name, needed in self.needs.items():
            if needed and name not in offered:
                raise UserError(
                    f"the reward function {self.name!r} takes {name!r}{did_you_mean(name, offered)}, but a sample has "
                    f"{', '.join(sorted(offered))}; rename the parameter or the column"
                )
        return offered if self.takes_all else {name: offered[name] for name in self.needs if name in offered}

    def line(self, number: int, offered: dict[str, Any]) -> bytes:
        """The call as a worker reads it. Raises UserError for a value that JSON has not."""
        try:
            return json.dumps([number, self.keywords(offered)], default=_plain).encode() + b"\n"
        except TypeError as error:
            raise UserError(
                f"a column for the reward function {self.name!r} cannot be sent to its process: {error}; "
                "use text, numbers, lists and mappings"
            ) from error


@dataclass
class Job:
    """One call of one function on one sample, and what came of it."""

    call: Call
    row: int  # of the sample
    offered: dict[str, Any]
    value: float = math.nan
    failure: str = ""  # what it did, as a sentence goes on after the function's name
    failures: int = 0


class RewardPool:
    """At most `processes` workers. They start when they are needed, and stay."""

    def __init__(self, calls: Sequence[Call], *, processes: int, limit_seconds: float, retries: int) -> None:
        self.calls, self.processes, self.limit_seconds, self.retries = calls, processes, limit_seconds, retries
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def run(self, jobs: Sequence[Job]) -> None:
        """Fill in the value or the failure of each job."""
        waiting = collections.deque(jobs)
        try:
            self._listen(0.0, waiting)  # for the end of workers since the last time
            while waiting or any(worker.job for worker in self._workers):
                self._hand_out(waiting)
                first = min(worker.deadline for worker in self._workers if worker.job)
                self._listen(max(0.0, first - time.monotonic()), waiting)
                self._end_late(waiting)
        except BaseException:  # an interrupt: no late answer may be taken for that of another call
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        for worker in list(self._workers):
            self._lose(worker)

    def _hand_out(self, waiting: collections.deque[Job]) -> None:
        idle = [worker for worker in self._workers if worker.job is None]
        while waiting and (idle or len(self._workers) < self.processes):
            worker = idle.pop() if idle else self._start()
            worker.begin(waiting.popleft(), self.limit_seconds)

    def _start(self) -> _Worker:
        worker = _Worker(self.calls)
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _listen(self, seconds: float, waiting: collections.deque[Job]) -> None:
        for key, _ in self._selector.select(seconds):
            self._hear(key.data, waiting)

    def _hear(self, worker: _Worker, waiting: collections.deque[Job]) -> None:
        answer = worker.answer(self.limit_seconds)
        if answer is None:
            return
        job, worker.job = worker.job, None
        if "ended" in answer:
            self._lose(worker)
        if job is None:  # it died idle
            return
        value = answer.get("value", math.nan)
        if math.isfinite(value):
            job.value, job.failure = value, ""
        else:
            self._fail(job, answer.get("failure") or f"returned {value}, not a finite number,", waiting)

    def _end_late(self, waiting: collections.deque[Job]) -> None:
        for worker in [each for each in self._workers if each.job and time.monotonic() >= each.deadline]:
            job, ready = worker.job, worker.ready
            self._lose(worker)
            assert job is not None, "chosen for it"
            late = f"took longer than {self.limit_seconds:g} s"
            self._fail(job, late if ready else f"was not imported within {_START_SECONDS:g} s", waiting)

    def _fail(self, job: Job, what: str, waiting: collections.deque[Job]) -> None:
        job.failures += 1
        job.failure = what
        if job.failures <= self.retries:
            waiting.append(job)

    def _lose(self, worker: _Worker) -> None:
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        worker.kill()


class _Worker:
    """A process that calls reward functions."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.job: Job | None = None
        self.ready = False
        self.deadline = math.inf
        self._unread = b""
        self._code: int | None = None  # None: not known to have ended
        self._numbers = {call.name: number for number, call in enumerate(calls)}
        self.socket, theirs = socket.socketpair()
        with theirs:
            paths = [call.path for call in calls if call.path]
            if len(paths) == len(calls):
                self.pid, self._wait = _fresh(theirs, paths)
            else:
                self.pid, self._wait = _forked(theirs, [call.function for call in calls])

    def begin(self, job: Job, limit_seconds: float) -> None:
        """Send it a call."""
        line = job.call.line(self._numbers[job.call.name], job.offered)
        self.job = job
        self.deadline = time.monotonic() + (limit_seconds if self.ready else _START_SECONDS)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: `answer` will see that
            self.socket.sendall(line)

    def answer(self, limit_seconds: float) -> dict[str, Any] | None:
        """What it said of its call, None while that is incomplete; with `ended` in it, it is no more."""
        try:
            found = self.socket.recv(_READ)
        except ConnectionResetError:
            found = b""
        if not found:
            self._code = self._wait(_END_SECONDS)
            return {"ended": True, "failure": f"ended its process ({_said(self._code)})"}
        *lines, self._unread = (self._unread + found).split(b"\n")
        for line in lines:
            answer: dict[str, Any] = json.loads(line)
            if "ready" not in answer:
                return answer
            self.ready, self.deadline = True, time.monotonic() + limit_seconds
        return None

    def kill(self) -> None:
        """End it at once, and what it has started."""
        self.socket.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)  # a fork may not have a group yet
            self._wait(None)


def _fresh(theirs: socket.socket, paths: list[str]) -> tuple[int, _Wait]:
    """Start an interpreter that imports the functions; its process and how to wait for its end."""
    task = json.dumps({"socket": theirs.fileno(), "functions": paths, "parent": os.getpid()})
    process = subprocess.Popen(
        [sys.executable, "-m", reward_worker.__name__, task],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )

    def wait(seconds: float | None) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        return None

    return process.pid, wait


def _forked(theirs: socket.socket, functions: list[Callable[..., Any]]) -> tuple[int, _Wait]:
    """Fork a process that has the functions."""
    parent = os.getpid()

    def run() -> None:
        os.setsid()
        reward_worker.serve(theirs, functions, parent)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    assert process.pid is not None, "started"

    def wait(seconds: float | None) -> int | None:
        process.join(seconds)
        return process.exitcode

    return process.pid, wait


def _said(code: int | None) -> str:
    if code is None:
        return "it closed its connection"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _found(name: str, function: Callable[..., Any] | str) -> tuple[str | None, Callable[..., Any]]:
    """The path by which a fresh interpreter finds the function, if there is one, and the function."""
    path = function if isinstance(function, str) else None
    found: Any = resolve(path) if path is not None else function
    if not callable(found):
        raise UserError(
            f"the reward function {name!r} is a {type(found).__name__}; give a callable, or its path module:function"
        )
    module, qualified = getattr(found, "__module__", None), getattr(found, "__qualname__", "")
    if path is None and module and module != "__main__" and getattr(sys.modules.get(module), qualified, None) is found:
        path = f"{module}:{qualified}"
    return path, found


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and of frameworks for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is no JSON")
