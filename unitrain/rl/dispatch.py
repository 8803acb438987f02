"""Which actor answers which prompts, and what becomes of a call that fails: decisions only, no actor is touched.

The unit is a call: some prompts of one step, for weights of one version. It is fixed before it is known who will
answer it, so that whoever does computes the same numbers. An actor answers its calls in the order in which it got
them: when it is lost, the first of them is under suspicion, and the others are just given to somebody else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .prompts import Request

BACKOFF_SECONDS, MOST_BACKOFF_SECONDS = 0.5, 30.0


class Call(NamedTuple):
    """Prompts of a step that are answered together, by weights of one version."""

    step: int
    version: int
    requests: tuple[Request, ...]

    def __str__(self) -> str:
        first, last = self.requests[0].place, self.requests[-1].place
        return f"step {self.step}, prompts {first}{f' to {last}' if last > first else ''}"


class GivenUp(NamedTuple):
    """A prompt that failed too often."""

    request: Request
    why: str


def calls(requests: Sequence[Request], version: int, at_once: int, wanted: Iterable[int]) -> list[Call]:
    """A step's prompts in calls of up to `at_once`; only the wanted places, but cut as if all were."""
    places = set(wanted)
    found = []
    for begin in range(0, len(requests), at_once):
        chosen = tuple(request for request in requests[begin : begin + at_once] if request.place in places)
        if chosen:
            found.append(Call(chosen[0].step, version, chosen))
    return found


def backoff_seconds(losses: int) -> float:
    """How long to wait before an actor is started again, after so many losses in a row; 0 after the first."""
    return 0.0 if losses < 2 else min(BACKOFF_SECONDS * 2.0 ** (losses - 2), MOST_BACKOFF_SECONDS)


class Dispatch:
    """Calls that wait, and those that each actor has."""

    def __init__(self, *, depth: int | None, retries: int) -> None:
        """`depth`: calls that an actor has at a time; None: all that are its share."""
        self.depth, self.retries = depth, retries
        self.waiting: list[Call] = []
        self.running: dict[str, list[Call]] = {}  # by actor, in its order
        self._failures: Counter[Call] = Counter()

    @property
    def open(self) -> list[Call]:
        """Every call that has no answer."""
        return [*self.waiting, *(call for own in self.running.values() for call in own)]

    def add(self, calls: Iterable[Call]) -> None:
        """More calls, behind those of earlier steps."""
        self.waiting = sorted([*self.waiting, *calls])

    def assign(self, actors: Sequence[str]) -> list[tuple[str, Call]]:
        """Give waiting calls to those actors that have least to do; who got which, in order."""
        given = []
        while self.waiting and actors:
            least = min(actors, key=lambda actor: len(self.running.get(actor, ())))
            own = self.running.setdefault(least, [])
            if self.depth is not None and len(own) >= self.depth:
                break
            call = self.waiting.pop(0)
            own.append(call)
            given.append((least, call))
        return given

    def answered(self, actor: str, call: Call) -> None:
        """The call has its answer."""
        self.running[actor].remove(call)
        self._failures.pop(call, None)

    def failed(self, actor: str, call: Call, why: str) -> list[GivenUp]:
        """The call raised: it is made again, then cut into its prompts, then given up."""
        self.running[actor].remove(call)
        return self._again(call, why)

    def lost(self, actor: str, why: str) -> list[GivenUp]:
        """The actor is no more: others take over its calls."""
        own = self.running.pop(actor, [])
        self.add(own[1:])
        return self._again(own[0], why) if own else []

    def forget(self) -> None:
        """Nothing is wanted any more."""
        self.waiting, self.running = [], {}
        self._failures.clear()

    def _again(self, call: Call, why: str) -> list[GivenUp]:
        self._failures[call] += 1
        if self._failures[call] <= self.retries:
            self.add([call])
            return []
        failures = self._failures.pop(call)
        if len(call.requests) == 1:
            return [GivenUp(call.requests[0], f"{why} ({failures} times)")]
        self.add(Call(call.step, call.version, (request,)) for request in call.requests)
        return []
