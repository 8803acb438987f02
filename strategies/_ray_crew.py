"""The actors of a run as one thing that does not die: whoever is lost is replaced, and the others with it.

What changes the state of the models is an act with a place in a journal. After a loss the whole group is made anew,
takes the newest copy of the state, and does again what the journal has since; updates are deterministic, so the run
goes on bit by bit. Nobody who waits for an act hears of it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from unitrain.actors.cluster_ray import private_or_running, visible_gpus
from unitrain.actors.group_ray import ActorGroup, NoRoom
from unitrain.actors.waiting_ray import ActorFailed
from unitrain.errors import RankFailed, UserError
from unitrain.recipe import Recipe
from unitrain.strategies._ray_boxes import Chunk, Stored, stored
from unitrain.strategies._ray_refusals import Options, num_actors, with_inner
from unitrain.strategies._ray_replica import Place, Replica
from unitrain.strategy import LoadReport, Report
from unitrain.world import World

AHEAD = 2  # updates that may be under way
_LONG_SECONDS = 24 * 3600.0  # of acts whose actors are watched otherwise
_FEWER_SECONDS = 2.0  # that a place for fewer actors is waited for


@dataclass
class Act:
    """A method of all replicas, and what came of it."""

    method: str
    args: tuple[Any, ...]
    what: str
    engine: int
    refs: list[Any] = field(default_factory=list)
    answers: list[Any] | None = None


@dataclass(frozen=True)
class Cut:
    """The state of engines at one place of the journal."""

    position: int
    engines: dict[int, list[Stored]]


class Crew:
    """All actors of a strategy. Not for several threads at once."""

    def __init__(self, recipe: Recipe, world: World, report: Report) -> None:
        self.recipe, self.world, self.report = recipe, world, report
        self.options = Options.of(recipe)
        self.number = num_actors(recipe)
        self._stack = contextlib.ExitStack()
        self._group: ActorGroup | None = None
        self._binds: list[Act] = []
        self._sources: list[Act] = []
        self._journal: list[Act] = []  # since the cut
        self._position = 0  # acts of the journal of all times
        self._done = 0  # acts whose answers are known
        self._cut: Cut | None = None
        self._pieces: dict[int, list[Stored]] = {}  # of the next cut
        self._pieces_at = -1
        self._flight: deque[Act] = deque()
        self._failures: tuple[int, int] = (-1, 0)  # (acts done, failures in a row there)

    # How it begins and ends.

    def open(self) -> None:
        """Connect to Ray, or start one, and gather the actors."""
        options, number = self.options, self.number
        # Room for the crew and for one small task beside it.
        cluster = private_or_running(
            options.address,
            cpus=max(1, round(number * options.cpus + 0.5)),
            gpus=visible_gpus(),
            name=f"unitrain-{os.getpid()}",
            object_store_bytes=int(options.object_store_mb * 2**20),
        )
        self._stack.enter_context(cluster)
        try:
            self._gather(number)
        except ActorFailed as error:
            self._recover(error)

    def close(self) -> None:
        """End all actors. May be repeated, also after a failure."""
        self._flight.clear()
        group, self._group = self._group, None
        try:
            if group is not None:
                group.kill()
        finally:
            self._stack.close()

    # Acts.

    def bind(self, args: tuple[Any, ...], name: str) -> int:
        """A new engine on all actors; its number."""
        number = len(self._binds)
        act = Act("bind", (number, *args), f"building role {name!r}", number)
        self._now(act)
        self._binds.append(act)
        return number

    def add_source(self, *args: Any) -> int:
        """A new source of rows; its number."""
        number = len(self._sources)
        act = Act("add_source", (number, *args), "opening the data", -1)
        self._now(act)
        self._sources.append(act)
        return number

    def begin(self, act: Act, expect: Any) -> None:
        """Start an update, and return while it is done; `expect` are its rows, which are loaded meanwhile."""
        self.look()
        while len(self._flight) >= AHEAD:
            self._settle_first()
        if self._flight:
            self._the_group.behind("expect", expect)
        self._send(act)
        self._flight.append(act)
        self._enter(act)
        every = self.options.snapshot_every
        if every and len(self._journal) >= every:
            self._snapshot()

    def settle(self, act: Act) -> list[Any]:
        """What came of an update, once it is done."""
        while act.answers is None:
            self._settle_first()
        return act.answers

    def settle_all(self) -> None:
        """Return when nothing is under way."""
        while self._flight:
            self._settle_first()

    def look(self) -> None:
        """Settle what is done, so that an error or a loss is known now."""
        while self._flight:
            refs = self._flight[0].refs
            if refs and not ray.wait(refs, num_returns=1, timeout=0)[0]:
                return
            self._settle_first()

    def ask(self, method: str, *args: Any, what: str, engine: int = -1) -> list[Any]:
        """An act that changes no model; the answers of all actors."""
        self.settle_all()
        act = Act(method, args, what, engine)
        self._now(act)
        assert act.answers is not None, "done now"
        return act.answers

    def load(self, engine: int, method: str, *args: Any) -> LoadReport:
        """Have an engine become what a checkpoint says."""
        self.settle_all()
        act = Act(method, (engine, *args), "loading", engine)
        self._now(act)
        self._enter(act)
        assert act.answers is not None, "done now"
        report: LoadReport = act.answers[0]
        return report

    def boxes(self, engine: int, kinds: Collection[str] | None) -> Iterator[Chunk]:
        """All boxes of an engine. A pass over everything is kept, to go on from after a loss."""
        self.settle_all()
        refs = self._stream(engine, kinds)
        kept: list[Stored] = []
        position = self._position
        for ref, here in refs:
            chunk: Chunk = ray.get(ref, timeout=self.options.start_seconds)
            if kinds is None:
                # Its memory may be that of a node which is lost with its actors.
                kept.append(Stored(chunk.labels, ref) if here else stored(chunk))
            yield chunk
        if kinds is None and position == self._position:
            self._keep(engine, kept)

    # The journal.

    def _enter(self, act: Act) -> None:
        self._journal.append(act)
        self._position += 1

    def _keep(self, engine: int, chunks: list[Stored]) -> None:
        """One engine's part of a cut, which counts once no engine lacks that has changed."""
        if self._pieces_at != self._position:
            self._pieces, self._pieces_at = {}, self._position
        self._pieces[engine] = chunks
        changed = {act.engine for act in self._journal} | set(self._cut.engines if self._cut else ())
        if changed <= set(self._pieces):
            self._cut = Cut(self._position, dict(self._pieces))
            self._journal = []

    def _snapshot(self) -> None:
        changed = {act.engine for act in self._journal} | set(self._cut.engines if self._cut else ())
        for engine in sorted(changed):
            for _ in self.boxes(engine, None):
                pass

    # Doing, and doing again.

    @property
    def _the_group(self) -> ActorGroup:
        assert self._group is not None, "the strategy is open"
        return self._group

    def _send(self, act: Act) -> None:
        try:
            act.refs = self._the_group.start(act.method, *act.args)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{act.what}: something cannot be sent to the actors ({str(error).splitlines()[0]}); let models, "
                "losses and functions use what stands at the top of a module, or belongs to the Trainer"
            ) from error

    def _await(self, act: Act) -> None:
        seconds = {"update": self.options.step_seconds, "bind": self.options.start_seconds}
        act.answers = self._the_group.result(
            act.refs,
            seconds=seconds.get(act.method, _LONG_SECONDS),
            what=act.what,
            silent_seconds=self.options.silent_seconds,
            tick=self._tick,
        )
        act.refs = []

    def _tick(self) -> None:
        """Whoever watches this process must know that it waits with reason; who is late here, is found here."""
        if self.world.heartbeat is not None:
            self.world.heartbeat.again()

    def _now(self, act: Act) -> None:
        """Do an act that nothing else is under way beside."""
        while True:
            try:
                self._send(act)
                self._await(act)
            except ActorFailed as error:
                self._recover(error)
            else:
                self._done += 1
                return

    def _settle_first(self) -> None:
        """The oldest update that is under way."""
        act = self._flight[0]
        try:
            if act.answers is None:
                self._await(act)
        except ActorFailed as error:
            self._recover(error)
            return
        self._flight.popleft()
        self._done += 1

    def _stream(self, engine: int, kinds: Collection[str] | None) -> list[tuple[Any, bool]]:
        """References to chunks, and whether each lies on this node."""
        while True:
            try:
                group = self._the_group
                streams = group.streams(
                    "boxes",
                    engine,
                    kinds,
                    seconds=_LONG_SECONDS,
                    what="handing out its state",
                    silent_seconds=self.options.silent_seconds,
                    tick=self._tick,
                )
                node = ray.get_runtime_context().get_node_id()
                return [
                    (ref, member.node == node)
                    for member, stream in zip(group.members, streams, strict=True)
                    for ref in stream
                ]
            except ActorFailed as error:
                self._recover(error)

    # Losses.

    def _recover(self, error: ActorFailed) -> None:
        """Another group in the place of this one, as far as this one was. Raises RankFailed where that is no use."""
        began = time.monotonic()
        while True:
            at, times = self._failures
            times = times + 1 if at == self._done else 1
            self._failures = self._done, times
            if times > self.options.replacements:
                raise RankFailed(f"{times} groups of actors in a row were lost at the same place: {error}") from error
            print(f"{error}\nall {self.number} actors are replaced ...", flush=True)
            if self._group is not None:
                self._group.kill()
                self._group = None
            try:
                again = self._gather_anew()
                break
            except ActorFailed as another:
                error = another
        seconds = round(time.monotonic() - began, 3)
        self.report(
            "actors_replaced",
            f"{error.name or 'an actor'} was replaced, and the others with it: {again} updates done again in "
            f"{seconds:.1f} s, on {self.number} actors",
            lost=error.name,
            host=error.host,
            pid=error.pid,
            actors=self.number,
            pids=[member.pid for member in self._the_group.members],
            repeated=again,
            seconds=seconds,
            error=str(error)[:2000],
        )

    def _gather_anew(self) -> int:
        """A new group at the place of the old one; how many acts it did again."""
        least = self.options.min_actors or self.number
        for number in range(self.number, least - 1, -1):
            try:
                self._gather(number, self.options.room_seconds if number == self.number else _FEWER_SECONDS)
                break
            except NoRoom as error:
                if number == least:
                    raise RankFailed(f"lost actors could not be replaced: {error}") from error
        for act in (*self._binds, *self._sources):
            self._repeat(act)
        if self._cut is not None:
            for engine, chunks in self._cut.engines.items():
                self._repeat(Act("load_stored", (engine, chunks, None), "going on from the copy in memory", engine))
        for act in self._journal:
            self._repeat(act)
        return sum(act.method == "update" for act in self._journal)

    def _repeat(self, act: Act) -> None:
        known = act.answers
        self._send(act)
        self._await(act)
        act.answers = act.answers if known is None else known

    def _gather(self, number: int, room_seconds: float | None = None) -> None:
        """Actors that have met. Raises ActorFailed where one is lost meanwhile, NoRoom where there is no place."""
        options, began = self.options, time.monotonic()
        gpus = options.gpus
        if gpus is None:
            api: Any = ray
            gpus = (
                1.0 if api.cluster_resources().get("GPU", 0) else 0.0
            )  # too few of them is no reason to train on CPUs
        bundle = {"CPU": options.cpus, **({"GPU": gpus} if gpus else {}), **(options.resources or {})}
        group = self._group = ActorGroup(
            Replica,
            number,
            name="actor",
            resources=bundle,
            placement=options.placement,
            room_seconds=options.room_seconds if room_seconds is None else room_seconds,
            start_seconds=options.start_seconds,
            tick=self._tick,
        )
        self.number = number
        left = options.start_seconds
        places: list[Place] = group.call("place", seconds=left, what="starting")
        port = group.first("free", seconds=left) if number > 1 else 0
        worlds = worlds_of(places, f"{places[0].address}:{port}" if number > 1 else "", self._threads)
        recipe = with_inner(self.recipe)
        by_node = {
            place.node: [gpu for other in places if other.node == place.node for gpu in other.gpus] for place in places
        }
        given = [(recipe, world, by_node[place.node]) for world, place in zip(worlds, places, strict=True)]
        left = max(left - (time.monotonic() - began), 1.0)
        group.result(
            group.start_each("open", given),
            seconds=left,
            what="meeting the others",
            silent_seconds=options.silent_seconds,
            tick=self._tick,
        )

    def _threads(self, place: Place, beside: int) -> int | None:
        """CPU threads of an actor among so many on its node: as our agent would share the cores."""
        if self.options.threads is not None:
            return self.options.threads
        ours = self.world.threads
        if ours is not None and self.world.starter == "alone":
            return ours  # the user's own word, for every process
        return max(1, min(ours or place.cores, place.cores) // beside)


def worlds_of(places: Sequence[Place], coordinator: str, threads: Callable[[Place, int], int | None]) -> list[World]:
    """Each actor's place among all; actors of one node stand together."""
    nodes = list(dict.fromkeys(place.node for place in places))
    found = []
    for rank, place in enumerate(places):
        beside = [other for other, there in enumerate(places) if there.node == place.node]
        found.append(
            World(
                rank=rank,
                size=len(places),
                local_rank=beside.index(rank),
                local_size=len(beside),
                node=nodes.index(place.node),
                nodes=len(nodes),
                coordinator=coordinator,
                starter="torchrun",  # whose variables an actor has
                threads=threads(place, len(beside)),
            )
        )
    return found
