"""The agents of a run on several nodes: node 0 listens and decides, the others connect to it and obey.

Each side sends a beat every second and takes the other for lost when nothing has come for a while by its own clock: no
two clocks are compared. What comes is put in one inbox, so that one loop waits for it and for everything else.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from .. import __version__
from ..errors import UserError
from ..world import LOOPBACK
from .job import AgentJob
from .mirror import Address, Mirror, Unshared, arrange
from .records import hostname
from .screen import say
from .wire import Channel, ChannelEnded, admit, approach, listen

BEAT_SECONDS, SILENT_SECONDS = 1.0, 15.0
_HELLO_SECONDS = 10.0
_RETRY_SECONDS = 0.25
_GOODBYE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an attempt's ranks of one node stand among all of them."""

    index: int = 0  # of this node among those that take part
    nodes: int = 1  # that take part
    host: str = LOOPBACK  # of rank 0, as every node reaches it
    port: int | None = None  # on which rank 0 will listen; None: this node chooses, because rank 0 is here
    address: str | None = None  # of this node, as the others reach it; None: one node
    snapshot: str = ""  # in the memory of every node; empty: none, or this node is to find one


class Alone:
    """The team of a run on one node: nobody to hear from and nobody to tell. Others have the same methods."""

    wake_fd: int | None = None  # becomes readable when there is news
    leads = True
    ended: Mapping[int, Mapping[str, Any]] = {}  # node -> how its part of the attempt ended

    @property
    def waiting(self) -> list[int]:
        """Nodes whose part of the attempt has not ended."""
        return []

    @property
    def incomplete(self) -> bool:
        """True when the attempt runs without a node that is here."""
        return False

    def gather(self, seconds: float) -> list[int]:
        """Wait that long for the nodes that are missing; those that are missing still."""
        return []

    def placement(self) -> Placement:
        """Of the next attempt's ranks on this node."""
        return Placement()

    def share_memory(self, fd: int) -> None:
        """Keep copies of the snapshots in this memory on other nodes, and of theirs in it."""

    def begin(self, **facts: Any) -> str:
        """Have the other nodes start their ranks; the name of the snapshot that all nodes have, if there is one."""
        return ""

    def news(self) -> list[dict[str, Any]]:
        """What other nodes have said since the last call."""
        return []

    def tell(self, **message: Any) -> None:
        """Say something to whom it concerns: node 0 to all others, they to node 0. Whoever is gone is no error."""

    def end(self, exit_code: int) -> None:
        """Tell the other nodes to leave, and wait for a moment until they have."""


@dataclass
class _Inbox:
    """What several threads have read, for one that waits for many things."""

    queue: SimpleQueue[dict[str, Any]] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)

    def put(self, message: dict[str, Any]) -> None:
        self.queue.put(message)
        with contextlib.suppress(BlockingIOError):  # full: it is readable anyway
            os.write(self._write, b"!")

    def take(self) -> list[dict[str, Any]]:
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 65536)
        found = []
        with contextlib.suppress(Empty):
            while True:
                found.append(self.queue.get_nowait())
        return found


class _Line:
    """One connection after its hello, read by a thread of its own."""

    mirror_port = 0  # of the other side
    has_snapshots = False  # in its memory, when it last said so

    def __init__(self, node: int, host: str, channel: Channel, inbox: _Inbox, lost: Callable[[_Line, str], None]):
        self.node, self.host, self.channel = node, host, channel
        self.peer = channel.peer
        self._inbox, self._lost = inbox, lost
        channel.wait_at_most(SILENT_SECONDS)
        threading.Thread(target=self._read, name=f"agent-of-node-{node}", daemon=True).start()
        threading.Thread(target=self._beat, name=f"beat-for-node-{node}", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """To whom may be gone: the thread that reads tells."""
        with contextlib.suppress(ChannelEnded):
            self.channel.send(message)

    def _read(self) -> None:
        try:
            while True:
                message = self.channel.receive()
                if message.get("kind") != "beat":
                    self._inbox.put({**message, "node": self.node})
        except ChannelEnded as error:
            self.channel.close()
            self._lost(self, str(error))

    def _beat(self) -> None:
        with contextlib.suppress(ChannelEnded):
            while True:
                self.channel.send({"kind": "beat"})
                time.sleep(BEAT_SECONDS)


class Leader(Alone):
    """The team as node 0 sees it."""

    def __init__(self, job: AgentJob, host: str, port: int, key: bytes) -> None:
        self.job, self._host, self._key = job, host, key
        self._inbox = _Inbox()
        self.wake_fd = self._inbox.fd
        self._lock = threading.Lock()
        self._lines: dict[int, _Line] = {}  # node -> who is here
        self._taking_part: list[int] = []  # nodes of the attempt beside this one
        self._waiting: set[int] = set()
        self.ended: dict[int, dict[str, Any]] = {}
        try:
            self._listener = listen(port)
        except OSError as error:
            raise UserError(
                f"the agent of node 0 cannot listen on port {port}: {error.strerror}; give --meet another port"
            ) from error
        threading.Thread(target=self._accept, name="agents", daemon=True).start()

    @property
    def waiting(self) -> list[int]:
        """See Alone."""
        return sorted(self._waiting)

    @property
    def incomplete(self) -> bool:
        """See Alone."""
        return not set(self._lines) <= set(self._taking_part)

    def gather(self, seconds: float) -> list[int]:
        """See Alone; returns early when the inbox has something to say."""
        deadline = time.monotonic() + seconds
        while missing := [node for node in range(1, self.job.nodes) if node not in self._lines]:
            left = deadline - time.monotonic()
            if left <= 0 or not self._inbox.queue.empty():
                return missing
            time.sleep(min(left, 0.02))
        return []

    def placement(self) -> Placement:
        """See Alone; of the nodes that are here now."""
        with self._lock:
            self._taking_part = sorted(self._lines)
            address = next((line.channel.address for line in self._lines.values()), None)
        return Placement(nodes=1 + len(self._taking_part), host=self._host, address=address)

    def share_memory(self, fd: int) -> None:
        """See Alone."""
        self._mirror = Mirror(fd, self.job.nodes * self.job.nproc, self._key)

    def begin(self, **facts: Any) -> str:
        """See Alone; facts: attempt, restarts, port."""
        self.ended.clear()
        self._waiting = set(self._taking_part)
        lines = [self._lines.get(node) for node in self._taking_part]
        mirrors: list[Address] = [(self._host, self._mirror.port)]
        mirrors += [(line.peer, line.mirror_port) for line in lines if line is not None]
        snapshot = self._arrange(mirrors) if all(lines) else ""
        nodes = len(self._taking_part) + 1
        self._mirror.send_on(range(self.job.nproc), mirrors[1] if len(mirrors) > 1 else None)
        for index, (node, line) in enumerate(zip(self._taking_part, lines, strict=True), start=1):
            if line is None:
                self._inbox.put({"kind": "lost", "node": node, "host": "", "why": "it left before the attempt"})
                continue
            following = mirrors[(index + 1) % nodes] if all(lines) else None
            place = {"index": index, "nodes": nodes, "host": self._host, "snapshot": snapshot}
            line.send({"kind": "start", **place, **facts, "mirror": following})
        return snapshot

    def _arrange(self, mirrors: Sequence[Address]) -> str:
        """Share the newest snapshot, where anybody holds one."""
        self._mirror.settle()
        if not self._mirror.parts() and not any(line.has_snapshots for line in self._lines.values()):
            return ""
        try:
            return arrange(self._mirror, mirrors, self._key, after=0)
        except Unshared as trouble:
            say(f"note: the ranks go on from the disk: {trouble}")
            return ""

    def news(self) -> list[dict[str, Any]]:
        """See Alone; `joined` is kept back, because only the next attempt can use it."""
        news = []
        for message in self._inbox.take():
            node, kind = message["node"], message.get("kind")
            if kind == "joined":
                continue
            if kind in ("ended", "lost"):
                if node not in self._waiting:
                    continue
                self._waiting.discard(node)
                if kind == "ended":
                    self.ended[node] = message
                    if (line := self._lines.get(node)) is not None:
                        line.has_snapshots = message["has_snapshots"]
                    continue
                message["first_rank"] = (1 + self._taking_part.index(node)) * self.job.nproc
            news.append(message)
        return news

    def tell(self, **message: Any) -> None:
        """See Alone."""
        for line in list(self._lines.values()):
            line.send(message)

    def end(self, exit_code: int) -> None:
        """See Alone."""
        self.tell(kind="end", exit_code=int(exit_code))
        deadline = time.monotonic() + _GOODBYE_SECONDS
        while self._lines and time.monotonic() < deadline:
            time.sleep(0.01)
        self._listener.close()
        self._mirror.close()
        for line in list(self._lines.values()):
            line.channel.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._greet, args=(connection,), name="agent-greeting", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        connection.settimeout(_HELLO_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            channel = admit(connection, self._key)
            hello = channel.receive()
            problem = self._problem(hello)
            if problem is not None:
                channel.send(problem)
                channel.close()
                return
            node, host = hello["node"], str(hello["host"])
            with self._lock:
                if node in self._lines:
                    channel.send({"kind": "taken", "by": self._lines[node].host})
                    channel.close()
                    return
                channel.send({"kind": "welcome"})
                line = _Line(node, host, channel, self._inbox, self._gone)
                line.mirror_port, line.has_snapshots = int(hello["mirror"]), bool(hello["has_snapshots"])
                self._lines[node] = line
            self._inbox.put({"kind": "joined", "node": node})
        except (ChannelEnded, OSError):
            connection.close()  # a stranger, or one that has gone again

    def _problem(self, hello: Mapping[str, Any]) -> dict[str, Any] | None:
        ours = _facts(self.job)
        for name, value in ours.items():
            if hello.get(name) != value:
                why = f"node {hello.get('node')} has {name} {hello.get(name)!r}, node 0 has {value!r}"
                return {"kind": "refused", "why": why}
        node = hello.get("node")
        if type(node) is not int or not 0 < node < self.job.nodes:
            return {"kind": "refused", "why": f"there is no node {node!r} beside node 0 among {self.job.nodes}"}
        return None

    def _gone(self, line: _Line, why: str) -> None:
        with self._lock:
            if self._lines.get(line.node) is line:
                del self._lines[line.node]
        self._inbox.put({"kind": "lost", "node": line.node, "host": line.host, "why": why})


class Member(Alone):
    """The team as any other node sees it: the agent of node 0."""

    leads = False

    def __init__(self, job: AgentJob, host: str, port: int, key: bytes, *, node: int) -> None:
        self.job, self.node, self._where, self._key = job, node, (host, port), key
        self._inbox = _Inbox()
        self.fd = self.wake_fd = self._inbox.fd
        self._line: _Line | None = None
        self.reason: str | None = None  # why it is not connected

    @property
    def address(self) -> str | None:
        """Of this node, as node 0 sees it."""
        return None if self._line is None else self._line.channel.address

    def join(self, seconds: float, stop_fd: int) -> bool:
        """Connect to node 0 within that time, or until the descriptor is readable; whether it worked.

        Raises UserError where node 0 refuses this node.
        """
        deadline = time.monotonic() + seconds
        while True:
            self.reason = self._try()
            if self.reason is None:
                return True
            left = deadline - time.monotonic()
            if left <= 0 or select.select([stop_fd], [], [], min(left, _RETRY_SECONDS))[0]:
                return False

    def share_memory(self, fd: int) -> None:
        """See Alone."""
        self._mirror = Mirror(fd, self.job.nodes * self.job.nproc, self._key)

    @property
    def has_snapshots(self) -> bool:
        """True when this node's memory holds any."""
        self._mirror.settle()
        return bool(self._mirror.parts())

    def send_on(self, first_rank: int, to: Sequence[Any] | None) -> None:
        """Send the snapshots of this node's ranks to the mirror at that host and port."""
        own = range(first_rank, first_rank + self.job.nproc)
        self._mirror.send_on(own, None if to is None else (to[0], to[1]))

    def news(self) -> list[dict[str, Any]]:
        """See Alone."""
        return self._inbox.take()

    def tell(self, **message: Any) -> None:
        """See Alone."""
        if self._line is not None:
            self._line.send(message)

    def leave(self) -> None:
        """End the connection."""
        self._mirror.close()
        if self._line is not None:
            self._line.channel.close()

    def _try(self) -> str | None:
        """Why it did not work; None: it did."""
        try:
            connection = socket.create_connection(self._where, timeout=_HELLO_SECONDS)
        except OSError as error:
            return str(error)
        connection.settimeout(_HELLO_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            channel = approach(connection, self._key)
            place = {"node": self.node, "host": hostname(), "mirror": self._mirror.port}
            channel.send({**_facts(self.job), **place, "has_snapshots": self.has_snapshots})
            answer = channel.receive()
        except ChannelEnded as error:
            connection.close()
            return str(error)
        if answer.get("kind") == "welcome":
            self._line = _Line(0, "", channel, self._inbox, self._gone)
            return None
        channel.close()
        if answer.get("kind") == "refused":
            raise UserError(
                f"the agent of node 0 refused this one: {answer.get('why')}; start both from one run folder"
            )
        return f"an agent of node {self.node} on {answer.get('by')} is connected already"

    def _gone(self, line: _Line, why: str) -> None:
        if self._line is line:
            self._line = None
            self._inbox.put({"kind": "lost", "node": 0, "why": why})


def meeting_place(text: str) -> tuple[str, int]:
    """`HOST:PORT`, with brackets around an IPv6 address. Raises UserError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--meet is {text!r}; it must be HOST:PORT of node 0")
    return host, int(port)


def _facts(job: AgentJob) -> dict[str, Any]:
    """In which all nodes must agree."""
    return {"unitrain": __version__, "run_id": job.run_id, "nodes": job.nodes, "nproc": job.nproc}
