"""A pool of Ray actors that generate: each can be lost, stopped or replaced alone, and no sample depends on that.

Nothing here waits without a limit. Time in which nobody looked does not count against an actor.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from ..actors.cluster_ray import private_or_running
from ..actors.group_ray import end_on_its_node, start_member
from ..actors.waiting_ray import Waited, look
from ..agent.hang import is_stopped
from ..agent.records import Process, hostname
from ..errors import UserError
from .dispatch import Call, Dispatch, GivenUp, backoff_seconds
from .recipe import RolloutRecipe
from .rollout_worker import Answers, RolloutFailed, RolloutWorker, StaleWeights, WeightsDiffer
from .sampler import Plan, Weights, content_hash
from .sampling import Sampling

START_SECONDS = 300.0  # of an actor's process, and of its imports
_UNSEEN_SECONDS = 1.0  # between two looks: more has been something else
_CLOSE_SECONDS = 2.0

Tell = Callable[..., None]  # (event, **facts)


class Answered(NamedTuple):
    """A call and its answers."""

    call: Call
    answers: Answers


@dataclass
class _Published:
    refs: tuple[Any, Any]  # (still, moving)
    digests: Mapping[str, int]
    content: int


class _Sent(NamedTuple):
    """Something that an actor was asked to do."""

    kind: str  # start, build, load or generate
    ref: Any
    what: Any  # the version, or the Call
    epoch: int  # of the pool


@dataclass
class _Actor:
    """One place of the pool and who has it."""

    number: int
    name: str = ""
    handle: Any = None  # None: nobody, until `begins`
    where: Waited = field(default_factory=lambda: Waited(""))
    calls: deque[_Sent] = field(default_factory=deque)  # in the order in which it does them
    sent: int | None = None  # version that it will hold once it has done what it was sent
    still: bool = False  # it has the tensors that do not move
    built: bool = False
    since: float = 0.0  # when it last got on
    begins: float = 0.0
    starts: int = 0


class RolloutPool:
    """`options.actors` actors on a cluster of Ray. A context manager: it ends them, and a private cluster too.

    Their names begin with those of the run and the attempt; actors of earlier attempts are ended first. `prompts`
    gives the tokens of a prompt; `ahead`: calls of coming steps are sent out while nobody looks.
    """

    def __init__(
        self,
        options: RolloutRecipe,
        plan: Plan,
        prompts: Callable[[int], NDArray[np.int64]],
        sampling: Sampling,
        *,
        run_id: str,
        attempt: str,
        ahead: bool,
        tell: Tell,
    ) -> None:
        self.options, self.plan, self.prompts, self.sampling, self.tell = options, plan, prompts, sampling, tell
        self._run, self._prefix = f"{run_id}.rollout.", f"{run_id}.rollout.{attempt}"
        self._dispatch = Dispatch(depth=None if ahead else 2, retries=options.retries)
        self._actors = [_Actor(number) for number in range(options.actors)]
        self._published: dict[int, _Published] = {}
        self._still: Any = None
        self._losses = 0  # in a row
        self._epoch = 0  # answers of an earlier one are not wanted
        self._looked = time.monotonic()
        self._open = contextlib.ExitStack()
        self.replaced = 0

    def __enter__(self) -> RolloutPool:
        options = self.options
        cpus, gpus = max(1, math.ceil(options.actors * options.cpus)), math.ceil(options.actors * options.gpus)
        self._open.enter_context(private_or_running(options.address, cpus=cpus, gpus=gpus, name=self._run.rstrip(".")))
        self._open.callback(self._end_all)
        try:
            self._refuse_no_room()
            self._end_earlier()
            for actor in self._actors:
                self._start(actor)
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    # What the trainer asks for.

    def publish(self, weights: Weights) -> None:
        """Calls of this version may come now. Versions that no call needs are forgotten."""
        if weights.still or self._still is None:
            self._still = ray.put(dict(weights.still))
            for actor in self._actors:
                actor.still, actor.sent = False, None
        moving = ray.put(dict(weights.moving))
        content = content_hash(weights.digests)
        self._published[weights.version] = _Published((self._still, moving), dict(weights.digests), content)
        wanted = {call.version for call in self._dispatch.open} | {weights.version}
        for version in set(self._published) - wanted:
            del self._published[version]

    def dispatch(self, calls: Iterable[Call]) -> None:
        """Have these calls answered; returns at once."""
        self._dispatch.add(calls)
        self._assign()

    def send(self, version: int) -> None:
        """Have every actor that is there load these weights now, for `loading` to tell when they have."""
        for actor in self._actors:
            if actor.built:
                self._send_weights(actor, version)

    @property
    def loading(self) -> bool:
        """Some actor has not loaded what it was sent."""
        return any(sent.kind == "load" for actor in self._actors for sent in actor.calls)

    @property
    def busy(self) -> bool:
        """Some call has no answer yet."""
        return bool(self._dispatch.open)

    def forget(self) -> None:
        """No open call is wanted any more, nor any version."""
        self._epoch += 1
        self._dispatch.forget()
        self._published.clear()
        for actor in self._actors:
            actor.sent = None

    def poll(self, seconds: float) -> list[Answered | GivenUp]:
        """What has come, after waiting at most so long for the first of it; lost and late actors are replaced.

        Raises WeightsDiffer, RolloutFailed where actors are lost again and again, and what building a model raised.
        """
        now = time.monotonic()
        if (unseen := now - self._looked) > _UNSEEN_SECONDS:
            for actor in self._actors:
                actor.since += unseen
        found: list[Answered | GivenUp] = []
        for actor in self._actors:
            if actor.handle is None and now >= actor.begins:
                self._start(actor)
        self._assign()
        heads = {actor.calls[0].ref: actor for actor in self._actors if actor.calls}
        limit = min([seconds, *(self._left(actor) for actor in self._actors)])
        if heads:
            done, _ = ray.wait(list(heads), num_returns=1, timeout=max(limit, 0.0), fetch_local=True)
            if done:
                done, _ = ray.wait(list(heads), num_returns=len(heads), timeout=0, fetch_local=True)
            for ref in done:
                found += self._take(heads[ref])
        else:
            time.sleep(max(limit, 0.0))
        self._looked = time.monotonic()
        for actor in self._actors:
            if actor.calls and self._left(actor) <= 0:
                found += self._late(actor)
        return found

    # One actor.

    def _start(self, actor: _Actor) -> None:
        options = self.options
        actor.starts += 1
        actor.name = f"{self._prefix}.{actor.number}.{actor.starts}"
        actor.where, actor.calls, actor.since = Waited(actor.name), deque(), time.monotonic()
        actor.sent, actor.still, actor.built = None, False, False
        actor.handle = start_member(
            actor.name,
            {"CPU": options.cpus, "GPU": options.gpus},
            own={"name": actor.name, "scheduling_strategy": "SPREAD" if options.placement == "SPREAD" else "DEFAULT"},
        )
        self._append(actor, "start", actor.handle.where.remote(), None)
        self._append(actor, "build", actor.handle.build.remote(RolloutWorker, options.engine, self.plan), None)

    def _assign(self) -> None:
        ready = {actor.name: actor for actor in self._actors if actor.built}
        for name, call in self._dispatch.assign(list(ready)):
            actor = ready[name]
            self._send_weights(actor, call.version)
            prompts = [self.prompts(request.prompt) for request in call.requests]
            ref = actor.handle.run.remote("generate", call.version, call.requests, prompts, self.sampling)
            self._append(actor, "generate", ref, call)

    def _send_weights(self, actor: _Actor, version: int) -> None:
        if actor.sent == version:
            return
        still, moving = self._published[version].refs
        parts = [moving] if actor.still else [still, moving]
        self._append(actor, "load", actor.handle.run.remote("load", version, *parts), version)
        actor.sent, actor.still = version, True

    def _append(self, actor: _Actor, kind: str, ref: Any, what: Any) -> None:
        if not actor.calls:
            actor.since = time.monotonic()
        actor.calls.append(_Sent(kind, ref, what, self._epoch))

    def _take(self, actor: _Actor) -> list[Answered | GivenUp]:
        """The first of the actor's calls has ended."""
        kind, ref, what, epoch = actor.calls[0]
        wanted = epoch == self._epoch
        try:
            value = ray.get(ref, timeout=self.options.limit_seconds)
        except RayTaskError as error:
            if wanted or kind != "generate":
                return self._failed(actor, kind, what, error)
        except RayError as error:  # it died; or a lost object, a node out of memory
            return self._lose(actor, _reason(error))
        actor.calls.popleft()
        actor.since = time.monotonic()
        if kind == "start":
            actor.where = value
        elif kind == "build":
            actor.built = True
            self._assign()
        elif kind == "load" and wanted:
            self._compare(actor, what, value)
        elif kind == "generate" and wanted:
            return self._answer(actor, what, value)
        return []

    def _answer(self, actor: _Actor, call: Call, answers: Answers) -> list[Answered | GivenUp]:
        published = self._published[call.version]
        if (answers.version, answers.content) != (call.version, published.content):
            # Never learnt from: whoever answers with other weights is replaced, and the prompts go to another.
            return self._lose(actor, f"answered with weights of version {answers.version}, not {call.version}")
        self._dispatch.answered(actor.name, call)
        self._losses = 0
        return [Answered(call, answers)]

    def _compare(self, actor: _Actor, version: int, found: Mapping[str, int]) -> None:
        published = self._published.get(version)
        if published is None:
            return  # its calls have gone to others
        wrong = [name for name, digest in published.digests.items() if found.get(name) != digest]
        if wrong:
            raise WeightsDiffer(
                f"the rollout actor {actor.where} holds other values in {wrong[0]} than the policy at version {version}"
                f"{f', and in {len(wrong) - 1} more tensors' if wrong[1:] else ''}; does rollout_model() build what "
                "build_model() does, with the same tied weights?"
            )

    def _failed(self, actor: _Actor, kind: str, what: Any, error: RayTaskError) -> list[Answered | GivenUp]:
        """The call itself raised, in an actor that lives."""
        cause = error.cause if isinstance(error.cause, BaseException) else error
        if isinstance(cause, UserError):
            raise cause
        if kind in ("build", "load"):
            raise RolloutFailed(f"the rollout actor {actor.where} failed in {kind}: {_words(cause)}") from cause
        if kind == "start" or isinstance(cause, StaleWeights):
            return self._lose(actor, _words(cause))
        actor.calls.popleft()
        actor.since = time.monotonic()
        self.tell("rollout_call_failed", call=str(what), actor=actor.name, error=_words(cause))
        return list(self._dispatch.failed(actor.name, what, _words(cause)))

    def _late(self, actor: _Actor) -> list[Answered | GivenUp]:
        if actor.calls[0].kind == "start" and any(other.built for other in self._actors):
            # A node may have gone for good: the others go on, and this one may come.
            self.tell("rollout_waits_for_room", actor=actor.name, free=self._room(free=True))
            self._end(actor)
            return []
        if actor.calls[0].kind == "start":
            raise RolloutFailed(
                f"no rollout actor has started within {START_SECONDS:g} s; each needs {self.options.cpus:g} CPUs and "
                f"{self.options.gpus:g} GPUs, and the Ray cluster has {self._room(free=True)} free"
            )
        return self._lose(actor, f"did not answer within {self._limit(actor):g} s", stack=True)

    def _room(self, *, free: bool) -> dict[str, float]:
        api: Any = ray
        found = api.available_resources() if free else api.cluster_resources()
        return {what: float(found.get(what, 0.0)) for what in ("CPU", "GPU")}

    def _refuse_no_room(self) -> None:
        """Raise UserError where the whole cluster is too small."""
        options, there = self.options, self._room(free=False)
        for what, each in (("CPU", options.cpus), ("GPU", options.gpus)):
            if options.actors * each > there[what]:
                raise UserError(
                    f"{options.actors} rollout actors of {each:g} {what} each need {options.actors * each:g}, and the "
                    f"Ray cluster has {there[what]:g}; use fewer actors, or a smaller rl.rollout.{what.lower()}s"
                )

    def _lose(self, actor: _Actor, why: str, *, stack: bool = False) -> list[Answered | GivenUp]:
        """The actor is no more, or no use: end it, have it replaced, and give its calls to others."""
        where, kind = actor.where, actor.calls[0].kind if actor.calls else ""
        account = look(where, stack).strip() if where.pid and where.host == hostname() else ""
        self._losses += 1
        self.replaced += 1
        wait = backoff_seconds(self._losses)
        self.tell(
            "rollout_lost",
            actor=actor.name, host=where.host, pid=where.pid, doing=kind, error=why, account=account[-2000:],
            losses=self._losses, again_seconds=wait,
        )  # fmt: skip
        self._end(actor)
        given_up = self._dispatch.lost(actor.name, f"the actor {where} {why}")
        if self._losses >= self.options.max_losses:
            raise RolloutFailed(
                f"{self._losses} rollout actors were lost in a row, the last one, {where}, while in "
                f"{kind or 'nothing'}: it {why}. {account}"
            )
        actor.begins = time.monotonic() + wait
        return list(given_up)

    def _end(self, actor: _Actor) -> None:
        """End the actor now, also one that is stopped and hears nothing."""
        handle, actor.handle, actor.built = actor.handle, None, False
        actor.calls.clear()
        if handle is not None:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(handle, no_restart=True)
        if actor.where.pid:
            with contextlib.suppress(RayError, OSError, ValueError):
                end_on_its_node(actor.where)

    def _limit(self, actor: _Actor) -> float:
        starting = actor.calls[0].kind in ("start", "build")
        stopped = starting and actor.where.host == hostname() and is_stopped(actor.where.pid)
        return START_SECONDS if starting and not stopped else self.options.limit_seconds

    def _left(self, actor: _Actor) -> float:
        """Seconds until something must have happened to this actor."""
        now = time.monotonic()
        if actor.handle is None:
            return max(actor.begins - now, 0.0)
        return actor.since + self._limit(actor) - now if actor.calls else START_SECONDS

    def _end_all(self) -> None:
        there = [actor for actor in self._actors if actor.handle is not None]
        for actor in there:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor.handle, no_restart=True)
        # Whoever ends of this alone is no accident, of which Ray would tell.
        here = [Process.of(actor.where.pid) for actor in there if actor.where.host == hostname()]
        deadline = time.monotonic() + _CLOSE_SECONDS
        while any(process.alive for process in here) and time.monotonic() < deadline:
            time.sleep(0.02)
        for actor in there:
            self._end(actor)

    def _end_earlier(self) -> None:
        """End actors of an earlier attempt of this run that its own end has left."""
        try:
            named: Sequence[Mapping[str, str]] = ray.util.list_named_actors(all_namespaces=True)
        except (RayError, RuntimeError):
            return
        for each in named:
            if each["name"].startswith(self._run) and not each["name"].startswith(self._prefix):
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(ray.get_actor(each["name"], namespace=each["namespace"]), no_restart=True)
                    self.tell("rollout_stale_ended", actor=each["name"])


def _reason(error: RayError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "died" in line or "killed" in line or "out of memory" in line), "")
    return f"was lost ({told[:300] or type(error).__name__})"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"
