"""Copies of snapshots on other nodes: each agent sends those of its ranks to the next one, and gets back what it lost.

An agent serves the snapshots in its memory to the others of its run. While ranks train, each finished snapshot goes to
the node after this one, in a ring. Before an attempt node 0 asks all agents what they hold, finds the newest snapshot
of which every rank's part is somewhere, and has every agent fetch the parts that its own memory lacks. A copy counts
only where the agent whose rank wrote it is gone: a rank may have taken its snapshot back. Whoever receives bytes checks
them against the SHA-256 of the rank that wrote them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..shared_memory import BUFFERS, HEADER, MAGIC, PAGE, Held, add_digests, held, place_of, sound
from .wire import Channel, ChannelEnded, admit, approach, listen

_SILENT_SECONDS = 15.0
_BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.1
_MOST_OF_FREE = 0.5  # of the memory that is free now: what is fetched may take so much
_NAMES = ("region", "step", "nonce")
_UNFINISHED = HEADER.pack(MAGIC, 1, 0, 0, 0, 0)

Address = tuple[str, int]


class Unshared(Exception):
    """There are snapshots, and not every node can have what it needs of them."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One rank's snapshot, wherever it lies."""

    region: int
    step: int
    nonce: str
    writers: int
    size: int  # bytes

    @property
    def name(self) -> list[Any]:
        """By which parts are told from each other."""
        return [self.region, self.step, self.nonce]

    @classmethod
    def of(cls, found: Held) -> Part:
        """What is told of it."""
        return cls(region=found.region, step=found.step, nonce=found.nonce, writers=found.writers, size=found.size)


@dataclass(frozen=True, kw_only=True)
class Order(Part):
    """A part to fetch, and the mirror that has it."""

    host: str
    port: int


class Mirror:
    """The snapshots of one node, and its way to those of others."""

    def __init__(self, memory_fd: int, regions: int, key: bytes) -> None:
        self._fd, self._regions, self._key = memory_fd, regions, key
        self._listener = listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()  # one writer of this memory beside the ranks
        self.own: Collection[int] = ()  # ranks of this node, in the newest attempt
        self._next: Address | None = None
        self._closing = threading.Event()
        for name, run in (("snapshots-out", self._serve), ("snapshots-on", self._send_on)):
            threading.Thread(target=run, name=name, daemon=True).start()

    def send_on(self, own: Collection[int], to: Address | None) -> None:
        """From now on send what these ranks finish to that agent."""
        self.own, self._next = own, to

    def parts(self) -> list[Part]:
        """What this memory holds, finished and with all checksums."""
        return [Part.of(found) for found in self._held()]

    def settle(self) -> None:
        """Add the checksums that our ranks had not come to when they ended; none of them may run."""
        for region in self.own:
            for buffer in range(BUFFERS):
                found = held(self._fd, region, buffer)
                if found is not None and not found.complete:
                    add_digests(self._fd, found)

    def fetch(self, orders: Sequence[Order]) -> bool:
        """Get parts from where they are; whether all came, and as they were written."""
        if sum(order.size for order in orders) > _MOST_OF_FREE * _free_bytes():
            return False
        try:
            for order in orders:
                with _connected((order.host, order.port), self._key) as channel:
                    channel.send({"kind": "get", "region": order.region, "step": order.step, "nonce": order.nonce})
                    message = channel.receive()
                    if message.get("kind") != "put" or [message[name] for name in _NAMES] != order.name:
                        return False
                    self._receive(channel, message, asked=True)
                if order.name not in [part.name for part in self.parts()]:
                    return False
        except (ChannelEnded, OSError, KeyError):
            return False
        return True

    def close(self) -> None:
        """Serve nobody any more."""
        self._closing.set()
        self._listener.close()

    def _held(self) -> list[Held]:
        found = (held(self._fd, region, buffer) for region in range(self._regions) for buffer in range(BUFFERS))
        return [each for each in found if each is not None and each.complete]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), name="snapshots", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_SILENT_SECONDS)
        with contextlib.suppress(ChannelEnded, OSError, KeyError, TypeError, ValueError), connection:
            channel = admit(connection, self._key)
            while True:
                self._obey(channel, channel.receive())

    def _obey(self, channel: Channel, message: Mapping[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "list":
            self.settle()
            channel.send({"parts": [vars(part) for part in self.parts()], "own": list(self.own)})
        elif kind == "put":
            self._receive(channel, message)
        elif kind == "get":
            asked = message["region"], message["step"], message["nonce"]
            found = next((each for each in self._held() if (each.region, each.step, each.nonce) == asked), None)
            if found is None:
                channel.send({"kind": "none"})
            else:
                self._give(channel, found)
        elif kind == "fetch":
            orders = [Order(**order) for order in message["orders"]]
            channel.send({"fetched": _beating(channel, lambda: self.fetch(orders))})

    def _send_on(self) -> None:
        """Watch the counts of our ranks' buffers and pass on what is new."""
        sent: dict[tuple[int, int], int] = {}
        channel: Channel | None = None
        to: Address | None = None
        while not self._closing.wait(_POLL_SECONDS):
            if self._next != to and channel is not None:
                channel.close()
                channel = None
            if (to := self._next) is None:
                continue
            try:
                for region in list(self.own):
                    for buffer in range(BUFFERS):
                        if _count(self._fd, region, buffer) == sent.get((region, buffer)):
                            continue
                        found = held(self._fd, region, buffer)
                        if found is None or not found.complete:
                            continue
                        channel = channel or _connect(to, self._key)
                        self._give(channel, found)
                        sent[region, buffer] = found.count
            except (ChannelEnded, OSError):
                if channel is not None:
                    channel.close()
                channel = None  # the agent there is gone, or not there yet
                sent.clear()
                self._closing.wait(_BEAT_SECONDS)
        if channel is not None:
            channel.close()

    def _give(self, channel: Channel, found: Held) -> None:
        """Send a snapshot; where its rank writes over it meanwhile, the other side is told to forget it."""
        part = vars(Part.of(found))
        channel.send({"kind": "put", **part, "tensors": found.files, "digests": found.digests})
        channel.send_file(self._fd, found.place, found.size)
        channel.send({"whole": _count(self._fd, found.region, found.buffer) == found.count})

    def _receive(self, channel: Channel, message: Mapping[str, Any], *, asked: bool = False) -> None:
        """Take a snapshot in, over the older of the two that are here; forget it where its bytes are not right."""
        region, size = message["region"], message["size"]
        if type(region) is not int or not 0 <= region < self._regions or type(size) is not int or size < PAGE:
            raise ChannelEnded("it sent no snapshot of this run")
        if region in self.own and not asked:
            raise ChannelEnded(f"rank {region} is here, and nobody else writes its snapshots")
        with self._lock:
            buffer = self._older(region)
            place = place_of(region, buffer)
            os.pwrite(self._fd, _UNFINISHED, place)
            try:
                page = channel.receive_bytes(PAGE)
                channel.receive_file(self._fd, place + PAGE, size - PAGE)
                whole = channel.receive().get("whole")
                if whole is not True:
                    return  # its rank has written over it meanwhile
                os.pwrite(self._fd, page[HEADER.size :], place + HEADER.size)
                os.pwrite(self._fd, page[: HEADER.size], place)
            except OSError as error:  # no memory: there is no copy then
                raise ChannelEnded(f"there is no memory for a copy: {error.strerror}") from error
            found = held(self._fd, region, buffer)
            told = [message["region"], message["step"], message["nonce"], message["digests"]]
            if (
                found is None
                or [region, found.step, found.nonce, list(found.digests)] != told
                or not sound(self._fd, found)
            ):
                os.pwrite(self._fd, _UNFINISHED, place)
                raise ChannelEnded(f"the snapshot of rank {region} has changed on its way")

    def _older(self, region: int) -> int:
        """The buffer to write over: an unfinished one, else the older."""
        found = [held(self._fd, region, buffer) for buffer in range(BUFFERS)]
        return min(range(BUFFERS), key=lambda buffer: -1 if (each := found[buffer]) is None else each.step)


def arrange(mirror: Mirror, addresses: Sequence[Address], key: bytes, *, after: int) -> str:
    """Have every node hold the newest snapshot that is whole over all of them, if it is of a later step than `after`.

    `addresses` are those of all mirrors, this one first. Returns the snapshot's name (`memory:<step>:<nonce>`), or
    nothing where no snapshot is whole. Raises Unshared where a node cannot get all of it.
    """
    with contextlib.ExitStack() as stack:
        try:
            channels = [stack.enter_context(_connected(address, key)) for address in addresses[1:]]
            for channel in channels:
                channel.send({"kind": "list"})
            mirror.settle()
            holders = [Holder(mirror.parts(), frozenset(mirror.own))]
            for channel in channels:
                told = channel.receive()
                holders.append(Holder([Part(**part) for part in told["parts"]], frozenset(told["own"])))
            holders = only_authentic(holders)
            if (chosen := newest_whole(holders, after=after)) is None:
                return ""
            orders = missing(holders, chosen, addresses)
            for channel, wanted in zip(channels, orders[1:], strict=True):
                channel.send({"kind": "fetch", "orders": [vars(order) for order in wanted]})
            came = [mirror.fetch(orders[0]), *(_after_beats(channel).get("fetched") is True for channel in channels)]
        except (ChannelEnded, OSError, KeyError, TypeError) as error:
            raise Unshared(f"the snapshots of a node cannot be had: {error}") from error
    if not all(came):
        raise Unshared(f"a node could not get all of the snapshot of step {chosen[0]}")
    return f"memory:{chosen[0]}:{chosen[1]}"


class Holder(NamedTuple):
    """What one mirror has."""

    parts: Sequence[Part]
    own: Collection[int]  # ranks that it has had in the attempt before; none: it has had no attempt


def only_authentic(holders: Sequence[Holder]) -> list[Holder]:
    """Without copies of what the mirror of the rank itself has no more."""
    owned = {region for holder in holders for region in holder.own}
    vouched = [part.name for holder in holders for part in holder.parts if part.region in holder.own]
    return [
        Holder([part for part in holder.parts if part.region not in owned or part.name in vouched], holder.own)
        for holder in holders
    ]


def newest_whole(holders: Sequence[Holder], *, after: int) -> tuple[int, str] | None:
    """Step and nonce of the newest snapshot of which every rank's part is with somebody."""
    found: dict[tuple[int, str], dict[int, int]] = {}
    for part in (part for holder in holders for part in holder.parts):
        found.setdefault((part.step, part.nonce), {})[part.region] = part.writers
    for (step, nonce), writers in sorted(found.items(), reverse=True):
        if step > after and all(count == len(writers) for count in writers.values()):
            return step, nonce
    return None


def missing(holders: Sequence[Holder], chosen: tuple[int, str], addresses: Sequence[Address]) -> list[list[Order]]:
    """For each node what its memory lacks of the chosen snapshot, and who has it."""
    having: dict[int, dict[int, Part]] = {}  # region -> node -> part
    for node, holder in enumerate(holders):
        for part in holder.parts:
            if (part.step, part.nonce) == chosen:
                having.setdefault(part.region, {})[node] = part
    orders: list[list[Order]] = []
    for node in range(len(holders)):
        absent = [of_nodes for of_nodes in having.values() if node not in of_nodes]
        # The fewest ask the same one: those who have a part are taken in turn.
        sources = [sorted(of_nodes)[node % len(of_nodes)] for of_nodes in absent]
        orders.append(
            [
                Order(**vars(of_nodes[source]), host=addresses[source][0], port=addresses[source][1])
                for of_nodes, source in zip(absent, sources, strict=True)
            ]
        )
    return orders


def _free_bytes() -> int:
    """Of memory, as the kernel estimates it."""
    with open("/proc/meminfo") as file:
        found = next(line for line in file if line.startswith("MemAvailable"))
    return int(found.split()[1]) << 10


def _count(fd: int, region: int, buffer: int) -> int:
    header = os.pread(fd, HEADER.size, place_of(region, buffer))
    count: int = HEADER.unpack(header)[1]
    return count


def _beating(channel: Channel, work: Callable[[], bool]) -> bool:
    """Do something that may take long, and let the other side know that it is under way."""
    done = threading.Event()

    def beat() -> None:
        with contextlib.suppress(ChannelEnded):
            while not done.wait(_BEAT_SECONDS):
                channel.send({"kind": "beat"})

    thread = threading.Thread(target=beat, name="snapshots-beat", daemon=True)
    thread.start()
    try:
        return work()
    finally:
        done.set()
        thread.join()


def _after_beats(channel: Channel) -> dict[str, Any]:
    while (message := channel.receive()).get("kind") == "beat":
        pass
    return message


def _connect(address: Address, key: bytes) -> Channel:
    connection = socket.create_connection(address, timeout=_SILENT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return approach(connection, key)


@contextlib.contextmanager
def _connected(address: Address, key: bytes) -> Iterator[Channel]:
    with contextlib.closing(_connect(address, key)) as channel:
        yield channel
