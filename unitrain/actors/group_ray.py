"""Several actors of one kind, as one thing: act on all, split rows among them, ask the first, end them together."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..agent.records import Process, hostname
from ..errors import UserError
from .cluster_ray import forget_starters
from .waiting_ray import ActorFailed, Waited, silent, wait

ROOM_SECONDS, START_SECONDS, CALL_SECONDS = 60.0, 180.0, 600.0
PING_SECONDS = 10.0  # an actor that fails because another has gone is told from one with a mistake of its own
_KILL_SECONDS = 5.0
_POLL_SECONDS = 0.5
PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


class NoRoom(UserError):
    """The cluster has not what a group asks for."""


class ActorGroup:
    """`number` actors that each hold one `kind(*args)`; `args` may be a function of the actor's number.

    `resources` are those of one actor, as Ray names them ({"CPU": 1}); `placement` is PACK, SPREAD or the strict form
    of either. No actor is restarted: whoever loses one decides what becomes of the others. Each act takes the seconds
    that it may last. Actors have the caller's module search path and working directory, and those of one node stand
    together.

    `tick` is called about once a second while they start. Raises NoRoom where the cluster has no place for all within
    `room_seconds`.
    """

    def __init__(
        self,
        kind: Callable[..., Any],
        number: int,
        *,
        name: str = "",
        resources: Mapping[str, float] | None = None,
        placement: str = "PACK",
        args: Sequence[Any] | Callable[[int], Sequence[Any]] = (),
        environ: Mapping[str, str] | None = None,
        room_seconds: float = ROOM_SECONDS,
        start_seconds: float = START_SECONDS,
        tick: Callable[[], None] | None = None,
    ) -> None:
        self.name = name or getattr(kind, "__name__", "actor").lower()
        self.number = number
        self.names = [f"{self.name}[{index}]" for index in range(number)]
        bundle = dict(resources or {"CPU": 1})
        self._room: PlacementGroup | None = _take_room(self.name, number, bundle, placement, room_seconds, tick)
        self._actors: list[Any] = []
        try:
            self._start(kind, bundle, args, environ or {}, start_seconds, tick)
        except BaseException:
            self.kill()
            raise

    def _start(
        self,
        kind: Callable[..., Any],
        bundle: Mapping[str, float],
        args: Sequence[Any] | Callable[[int], Sequence[Any]],
        environ: Mapping[str, str],
        seconds: float,
        tick: Callable[[], None] | None,
    ) -> None:
        self.members = [Waited(name) for name in self.names]
        deadline = time.monotonic() + seconds
        self._actors = [start_member(name, bundle, environ, self._room, index) for index, name in enumerate(self.names)]
        asked = [actor.where.remote() for actor in self._actors]
        found = wait(asked, names=self.names, seconds=seconds, what="starting", meanwhile=tick)
        # Those of one node stand together, in the order in which Ray names the nodes.
        nodes = list(dict.fromkeys(member.node for member in found))
        order = sorted(range(self.number), key=lambda index: (nodes.index(found[index].node), index))
        self._actors = [self._actors[index] for index in order]
        self.members = [
            dataclasses.replace(found[index], name=name) for index, name in zip(order, self.names, strict=True)
        ]
        given = [tuple(args(index)) if callable(args) else tuple(args) for index in range(self.number)]
        built = [actor.build.remote(kind, *mine) for actor, mine in zip(self._actors, given, strict=True)]
        left = max(deadline - time.monotonic(), 1.0)
        wait(built, names=self.members, seconds=left, what="starting", meanwhile=tick)

    def call(self, method: str, *args: Any, seconds: float = CALL_SECONDS, what: str = "") -> list[Any]:
        """`method(*args)` on every actor; their answers, in order."""
        return self.result(self.start(method, *args), seconds=seconds, what=what or f"in {method}")

    def split(self, method: str, rows: Sequence[Any], *args: Any, seconds: float = CALL_SECONDS) -> list[Any]:
        """`method(my rows, *args)` on every actor, each with its even part of the rows; their answers, in order."""
        bounds = [len(rows) * index // self.number for index in range(self.number + 1)]
        refs = [
            actor.run.remote(method, rows[bounds[index] : bounds[index + 1]], *args)
            for index, actor in enumerate(self._actors)
        ]
        return self.result(refs, seconds=seconds, what=f"in {method}")

    def gather(self, method: str, rows: Sequence[Any], *args: Any, seconds: float = CALL_SECONDS) -> list[Any]:
        """As `split`, of a method that returns a list: all their items as one list, in the order of the rows."""
        return [item for answer in self.split(method, rows, *args, seconds=seconds) for item in answer]

    def first(self, method: str, *args: Any, seconds: float = CALL_SECONDS) -> Any:
        """`method(*args)` on the first actor alone; for what is no collective."""
        return self.one(0, method, *args, seconds=seconds)

    def one(self, index: int, method: str, *args: Any, seconds: float = CALL_SECONDS) -> Any:
        """`method(*args)` on one actor alone."""
        refs = [self._actors[index].run.remote(method, *args)]
        return self.result(refs, seconds=seconds, what=f"in {method}", members=[self.members[index]])[0]

    def start(self, method: str, *args: Any) -> list[Any]:
        """Begin `method(*args)` on every actor and return at once: what `result` waits for, or ray.get."""
        return [actor.run.remote(method, *args) for actor in self._actors]

    def start_each(self, method: str, args: Sequence[Sequence[Any]]) -> list[Any]:
        """The same with arguments for each actor."""
        return [actor.run.remote(method, *mine) for actor, mine in zip(self._actors, args, strict=True)]

    def behind(self, method: str, *args: Any) -> None:
        """Have every actor do `method(*args)` beside its other work; nobody hears how it went."""
        for actor in self._actors:
            actor.run_behind.remote(method, *args)

    def streams(
        self,
        method: str,
        *args: Any,
        seconds: float,
        what: str,
        silent_seconds: float | None = None,
        tick: Callable[[], None] | None = None,
    ) -> list[list[Any]]:
        """References to what the generator `method(*args)` yields on every actor, once all have come to the end."""
        streams = [actor.flow.remote(method, *args) for actor in self._actors]
        ends = [stream.completed() for stream in streams]
        self.result(ends, seconds=seconds, what=what, silent_seconds=silent_seconds, tick=tick)
        return [list(stream) for stream in streams]

    def result(
        self,
        refs: Sequence[Any],
        *,
        seconds: float,
        what: str,
        members: Sequence[Waited] | None = None,
        silent_seconds: float | None = None,
        tick: Callable[[], None] | None = None,
    ) -> list[Any]:
        """What those calls gave. An error that comes of another actor's end is raised as that actor's.

        With `silent_seconds` all actors are asked now and then whether they are there, however busy; whoever does not
        answer for so long is ActorSilent. `tick` is called about once a second.
        """
        waited = self.members if members is None else list(members)
        pulse = None if silent_seconds is None else _Pulse(self._actors, self.members, silent_seconds, what)

        def meanwhile() -> None:
            if tick is not None:
                tick()
            if pulse is not None:
                pulse.feel()

        watched = meanwhile if pulse is not None or tick is not None else None
        try:
            return wait(refs, names=waited, seconds=seconds, what=what, meanwhile=watched)
        except ActorFailed:
            raise
        except UserError:
            raise
        except Exception as error:
            if len(self._actors) > 1:
                self._refuse_lost(what, error)
            raise

    def _refuse_lost(self, what: str, error: Exception) -> None:
        """Raise ActorFailed where an actor does not answer any more: then that is why another one failed."""
        answers = [actor.where.remote() for actor in self._actors]
        try:
            wait(answers, names=self.members, seconds=PING_SECONDS, what=what)
        except ActorFailed as lost:
            raise lost from error

    def kill(self) -> None:
        """End every actor now, also one that is stopped or stuck, and give its place back. May be repeated."""
        actors, self._actors = self._actors, []
        for actor in actors:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor, no_restart=True)
        if self._room is not None and ray.is_initialized():
            with contextlib.suppress(RayError, ValueError):
                remove_placement_group(self._room)
        self._room = None
        if ray.is_initialized():
            end_on_their_nodes(getattr(self, "members", []))


def start_member(
    name: str,
    bundle: Mapping[str, float],
    environ: Mapping[str, str] | None = None,
    room: PlacementGroup | None = None,
    index: int = -1,
    own: Mapping[str, Any] | None = None,
) -> Any:
    """A new actor that holds nothing yet, never restarted by Ray; its place in a placement group, if any.

    `own` are further options of Ray's.
    """
    options: dict[str, Any] = {
        "num_cpus": bundle.get("CPU", 0),
        "num_gpus": bundle.get("GPU", 0),
        "resources": {what: amount for what, amount in bundle.items() if what not in ("CPU", "GPU", "memory")},
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    if room is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=index)
    if environ:
        options["runtime_env"] = {"env_vars": dict(environ)}
    options |= own or {}
    remote: Any = ray.remote
    kind = remote(concurrency_groups={"answers": 1, "behind": 1})(_Member)
    return kind.options(**options).remote(name, list(sys.path), os.getcwd())


class _Pulse:
    """Who of a group has not answered for too long. Answers come from a thread of their own."""

    def __init__(self, actors: Sequence[Any], members: Sequence[Waited], seconds: float, what: str) -> None:
        self._actors, self._members, self._seconds, self._what = list(actors), members, seconds, what
        self._asked: dict[int, tuple[Any, float]] = {}
        self._heard = [time.monotonic()] * len(self._actors)

    def feel(self) -> None:
        """Raise ActorSilent, naming all who are, where one has been silent for too long; ActorLost for a dead one."""
        now = time.monotonic()
        for index, actor in enumerate(self._actors):
            ref = self._asked.get(index, (None, now))[0]
            if ref is not None and ray.wait([ref], timeout=0)[0]:
                self._heard[index] = now
                del self._asked[index]
                wait([ref], names=[self._members[index]], seconds=PING_SECONDS, what=self._what)
                ref = None
            if ref is None and now - self._heard[index] > min(self._seconds / 4, PING_SECONDS):
                self._asked[index] = actor.where.remote(), now
        late = [
            self._members[index] for index, (_, since) in self._asked.items() if now - since > self._seconds * 3 / 4
        ]
        if late:
            raise silent(late, self._what, self._seconds)


class _Member:
    """The process of an actor: one thread works, another answers, a third does what is wanted later."""

    def __init__(self, name: str, paths: Sequence[str] = (), folder: str = "") -> None:
        forget_starters()
        sys.path.extend(path for path in paths if path not in sys.path)  # before anything of the user's is unpickled
        if folder and os.path.isdir(folder):
            os.chdir(folder)
        worker: Any = ray._private.worker.global_worker  # there is no public way to its log
        logs = tuple(str(path) for path in (worker.get_out_file_path(), worker.get_err_file_path()) if path)
        beside = Path(logs[0]).parent if logs else Path(tempfile.gettempdir())
        self._stacks = (beside / f"stacks-{os.getpid()}").open("w")
        # By C code in the signal handler itself: it also speaks of an actor that hangs in C code or holds the GIL.
        faulthandler.register(signal.SIGQUIT, self._stacks, all_threads=True)
        node = ray.get_runtime_context().get_node_id()
        self._where = Waited(name, hostname(), os.getpid(), node, logs, self._stacks.name)
        self._held: Any = None

    @ray.method(concurrency_group="answers")
    def where(self) -> Waited:
        """Who I am; answered while I work."""
        return self._where

    def build(self, kind: Callable[..., Any], *args: Any) -> None:
        """Make what this actor holds."""
        self._held = kind(*args)

    def run(self, method: str, *args: Any) -> Any:
        """A method of what this actor holds."""
        return getattr(self._held, method)(*args)

    @ray.method(concurrency_group="behind")
    def run_behind(self, method: str, *args: Any) -> None:
        """The same beside other work."""
        getattr(self._held, method)(*args)

    @ray.method(num_returns="streaming")
    def flow(self, method: str, *args: Any) -> Iterator[Any]:
        """What a generator yields."""
        yield from getattr(self._held, method)(*args)


def _take_room(
    name: str,
    number: int,
    bundle: Mapping[str, float],
    placement: str,
    seconds: float,
    tick: Callable[[], None] | None,
) -> PlacementGroup:
    if placement not in PLACEMENTS:
        raise UserError(f"placement {placement!r} is none of {', '.join(PLACEMENTS)}")
    room: PlacementGroup = placement_group([dict(bundle)] * number, strategy=placement)
    deadline = time.monotonic() + seconds
    while not room.wait(max(min(deadline - time.monotonic(), _POLL_SECONDS), 0.05)):
        if tick is not None:
            tick()
        if time.monotonic() < deadline:
            continue
        remove_placement_group(room)
        asked = ", ".join(f"{amount:g} {what}" for what, amount in bundle.items())
        api: Any = ray
        there = {what: amount for what, amount in api.cluster_resources().items() if what in bundle}
        free = {what: amount for what, amount in api.available_resources().items() if what in bundle}
        of_cluster = ", ".join(f"{amount:g} {what} ({free.get(what, 0):g} free)" for what, amount in there.items())
        raise NoRoom(
            f"{number} actors {name!r} of {asked} each ({placement}) have found no room in the Ray cluster within "
            f"{seconds:g} s: it has {of_cluster or 'none of that'}; ask for fewer or smaller actors, or add nodes"
        )
    return room


def end_on_their_nodes(members: Sequence[Waited]) -> None:
    """The same for several at once: one task on each other node."""
    elsewhere: dict[str, list[int]] = {}
    for member in members:
        if member.pid and member.host == hostname():
            end(member.pid)
        elif member.pid:
            elsewhere.setdefault(member.node, []).append(member.pid)
    tasks = []
    for node, pids in elsewhere.items():
        with contextlib.suppress(RayError, ValueError):
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            tasks.append(
                ray.remote(num_cpus=0, max_retries=0)(_end_all).options(scheduling_strategy=there).remote(pids)
            )
    if tasks:
        with contextlib.suppress(RayError, ValueError):
            ray.wait(tasks, num_returns=len(tasks), timeout=_KILL_SECONDS)


def _end_all(pids: Sequence[int]) -> None:
    for pid in pids:
        end(pid)


def end_on_its_node(member: Waited) -> None:
    """SIGKILL by the kernel, where Ray's own word was not heard: a stopped process hears nothing."""
    if member.host == hostname():
        end(member.pid)
        return
    task = ray.remote(num_cpus=0, max_retries=0)(end).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(member.node, soft=False)
    )
    ray.get(task.remote(member.pid), timeout=_KILL_SECONDS)


def end(pid: int) -> None:
    """End a worker process of Ray on this machine, if it is still one."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return
    if not title.startswith(b"ray::"):
        return  # gone, and its number is another's
    process = Process.of(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _KILL_SECONDS
    while process.alive and _running(pid) and time.monotonic() < deadline:
        threading.Event().wait(0.02)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
