"""Small talk between ranks over plain sockets, for frameworks that have no store of their own.

Rank 0 listens at the coordinator's address, and each other rank holds one connection to it. Who loses a rank tells the
others, so that all know at once which it is. Messages are JSON, one a line; what is said is said by all ranks in the
same order.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, NoReturn

from .errors import RankFailed, UserError
from .world import World

JOIN_SECONDS = 600.0
_RETRY_SECONDS = 0.05
_HELLO_SECONDS, _HELLO_BYTES = 2.0, 200  # what a stranger may take of our time, and say
_MESSAGE_BYTES = 64 << 20  # of one line; no rank says more, and whoever does is not understood
_LEAVE_SECONDS = 0.2
_FAIL_SECONDS = 2.0  # that a rank has to fail by itself, and to say why, once another has failed
_LAST_SECONDS = 1.0  # that a rank which has lost another one still lives: the cause, and its agent, speak first
_SILENT_SECONDS = 5  # between probes of a machine that says nothing; three are unanswered where it is gone
_SILENT_PROBES = 3


class PeerLost(RankFailed):
    """Another rank has gone, or left while this one waited for it."""


class Meeting:
    """All ranks of a run. Every method is a collective but `close` and `abandon`.

    Raises UserError where the ranks do not find each other within `timeout` seconds. Whoever waits in a collective for
    a rank that is no more gets PeerLost. `lost` is called too, from a thread of the meeting's own: at once where a rank
    has died, a few seconds later where it has failed and this one has not, and never where it has left in good order.
    """

    def __init__(
        self, world: World, *, timeout: float = JOIN_SECONDS, lost: Callable[[PeerLost], None] | None = None
    ) -> None:
        self.world, self._lost = world, lost
        self.gone: PeerLost | None = None  # the first rank that has gone, and how
        self._closing = False
        self._peers: dict[int, _Peer] = {}
        self._news = threading.Lock()  # held by rank 0 while it answers: that somebody has left comes after
        if world.size == 1:
            return
        deadline = time.monotonic() + timeout
        try:
            if world.first:
                self._accept(deadline)
            else:
                self._join(deadline)
            self._gather(None, deadline)
        except BaseException:
            self.close()
            raise

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (JSON), by rank, on every rank."""
        return self._gather(value)

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self._gather(value if self.world.first else None)[0]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self._gather(None)

    def close(self) -> None:
        """Take leave. While an exception passes by, this is `abandon`. May be repeated."""
        self._leave("left" if isinstance(sys.exception(), GeneratorExit | None) else "failed")

    def abandon(self) -> None:
        """Leave because of a failure: the others' collectives end at once, and `lost` is called on them soon."""
        self._leave("failed")

    def _leave(self, how: str) -> None:
        self._closing = True
        for peer in self._peers.values():
            peer.send_quietly({"end": how})
        for peer in self._peers.values():
            peer.close()
        self._peers = {}

    def _gather(self, value: Any, deadline: float | None = None) -> list[Any]:
        if self.world.size == 1:
            return [value]
        if not self._peers:
            raise PeerLost("this rank has closed the meeting; ranks talk before that")
        if not self.world.first:
            self._peers[0].send({"says": value})
            found: list[Any] = self._peers[0].receive(deadline)
            return found
        values = [value, *(self._peers[rank].receive(deadline) for rank in range(1, self.world.size))]
        with self._news:
            for peer in self._peers.values():
                peer.send({"says": values})
        return values

    def _accept(self, deadline: float) -> None:
        """Let every other rank in; whatever else knocks is turned away."""
        others = set(range(1, self.world.size))
        with self._listen() as server:
            while missing := others - set(self._peers):
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    raise UserError(
                        f"{_named(missing)} did not come to {self.world.coordinator} in time; see "
                        f"{'its log' if len(missing) == 1 else 'their logs'}"
                    ) from None
                lines = connection.makefile("rb")
                hello = _hello(connection, lines, _HELLO_SECONDS)
                rank = hello.get("rank")
                # `type`, because True is an int; and ranks of another run know another size
                if type(rank) is int and rank in missing and hello.get("size") == self.world.size:
                    self._admit(rank, connection, lines)
                    self._peers[rank].send_quietly({"rank": 0, "size": self.world.size})
                else:
                    lines.close()
                    connection.close()

    def _listen(self) -> socket.socket:
        host, port = self.world.coordinator_address
        server = socket.socket(_family(host))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # A machine's own name may lead to an address that others cannot reach, so not that one alone.
            server.bind((host if _loopback(host) else "", port))
            server.listen(self.world.size)
        except OSError as error:
            server.close()
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"rank 0 cannot listen at {self.world.coordinator}: {error}") from error
            raise UserError(
                f"rank 0 cannot listen at {self.world.coordinator}, where something else does; under torchrun, set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or else choose another MASTER_PORT"
            ) from error
        return server

    def _join(self, deadline: float) -> None:
        """Try until rank 0 lets this rank in: it may start late, and something old may still stand in its place."""
        reason = "nothing listens there"
        while (left := deadline - time.monotonic()) > 0:
            try:
                connection = socket.create_connection(self.world.coordinator_address, timeout=min(left, 5))
            except OSError as error:
                reason = str(error)
            else:
                lines = connection.makefile("rb")
                reason = "what listens there is not rank 0 of this run"
                # Where nobody listens, a connection within one machine may get its own port, and talk to itself.
                if connection.getsockname() != connection.getpeername():
                    with contextlib.suppress(OSError):
                        connection.sendall(_line({"rank": self.world.rank, "size": self.world.size}))
                    # Rank 0 may be busy with strangers: who gives up early is taken for dead.
                    left = max(deadline - time.monotonic(), 0.001)
                    if _hello(connection, lines, left) == {"rank": 0, "size": self.world.size}:
                        self._admit(0, connection, lines)
                        return
                lines.close()
                connection.close()
            time.sleep(_RETRY_SECONDS)
        raise UserError(f"rank 0 does not answer at {self.world.coordinator}: {reason}; see its log")

    def _admit(self, rank: int, connection: socket.socket, lines: BinaryIO) -> None:
        connection.settimeout(None)
        _watch_silence(connection)
        self._peers[rank] = _Peer(rank, connection, lines, self._gone)

    def _gone(self, rank: int, how: str) -> None:
        """A rank has gone: end every waiting here, tell the others, and then the owner, unless all was in order."""
        if self._closing:
            return
        error = PeerLost(f"rank {rank} has {_GONE[how]}; its log says why")
        self.gone = self.gone or error
        peers = list(self._peers.values())
        for peer in peers:
            peer.fail(error)
        if self.world.first:
            with self._news:
                for peer in peers:
                    if peer.rank != rank:
                        peer.send_quietly({"gone": rank, "how": how})
        if how == "died":
            self._tell(error)
        elif how == "failed":
            timer = threading.Timer(_FAIL_SECONDS, self._tell, (error,))
            timer.daemon = True
            timer.start()

    def _tell(self, error: PeerLost) -> None:
        """The owner hears of one rank: the others most likely went because of it."""
        lost, self._lost = self._lost, None
        if lost is not None and not self._closing:
            lost(error)


_GONE = {"left": "left while others wait for it", "failed": "failed", "died": "gone without a word"}


class _Peer:
    """One connection, read by a thread of its own so that its end is noticed whatever this rank is doing."""

    def __init__(self, rank: int, connection: socket.socket, lines: BinaryIO, gone: Callable[[int, str], None]) -> None:
        self.rank, self._connection, self._lines, self._gone = rank, connection, lines, gone
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._read, name=f"unitrain-peer-{rank}", daemon=True)
        self._thread.start()

    def send(self, message: dict[str, Any]) -> None:
        line = _line(message)
        try:
            self._connection.sendall(line)
        except OSError as error:
            # Its thread learns why: what the other side said last may be that it leaves.
            raise self._messages_end(error) from error

    def send_quietly(self, message: dict[str, Any]) -> None:
        """To whom may be gone."""
        with contextlib.suppress(OSError):
            self._connection.sendall(_line(message))

    def receive(self, deadline: float | None = None) -> Any:
        """What it says next. Raises PeerLost where that will never come, UserError where it is late."""
        try:
            found = self._messages.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0.001))
        except Empty:
            raise UserError(f"rank {self.rank} said nothing in time; see the logs of all ranks") from None
        if isinstance(found, PeerLost):
            self.fail(found)
            raise PeerLost(str(found))
        return found

    def fail(self, error: PeerLost) -> None:
        """Whoever waits for this rank, now or later, gets that error."""
        self._messages.put(error)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        if threading.current_thread() is not self._thread:
            self._thread.join(_LEAVE_SECONDS)  # the other side may stay longer; its end is then no concern of ours
        self._connection.close()

    def _messages_end(self, error: OSError) -> PeerLost:
        self._thread.join(_LEAVE_SECONDS)
        while not self._messages.empty():
            if isinstance(found := self._messages.get(), PeerLost):
                self.fail(found)
                return PeerLost(str(found))
        return PeerLost(f"rank {self.rank} cannot be reached: {error}; its log says why")

    def _read(self) -> None:
        how = "died"
        try:
            # What cannot be read or understood ends the connection, as if the rank had died.
            with contextlib.suppress(OSError, ValueError, RecursionError), self._lines:
                while line := self._lines.readline(_MESSAGE_BYTES):
                    message = _understood(line)
                    if "says" in message:
                        self._messages.put(message["says"])
                    elif "gone" in message:
                        self._gone(message["gone"], message["how"])
                    else:
                        how = message["end"]
        finally:
            self._gone(self.rank, how)


def end_process(error: PeerLost) -> NoReturn:
    """For `lost`: end with exit code 70, though the main thread may wait in a framework's collective."""
    print(error, file=sys.stderr, flush=True)
    time.sleep(_LAST_SECONDS)
    sys.stdout.flush()
    os._exit(error.exit_code)


def free_port(host: str) -> int:
    """A port on which nobody listens now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def _hello(connection: socket.socket, lines: BinaryIO, seconds: float) -> dict[str, Any]:
    """The first line of a connection, which may come from anybody; empty where it is not one of ours."""
    connection.settimeout(seconds)
    try:
        found = json.loads(lines.readline(_HELLO_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _understood(line: bytes) -> dict[str, Any]:
    """A message of a rank. Raises ValueError for anything else."""
    message = json.loads(line)
    if isinstance(message, dict):
        rank, how = message.get("gone", 0), message.get("how", message.get("end"))
        if "says" in message or (type(rank) is int and how in ("left", "failed", "died")):
            return message
    raise ValueError(f"{line[:80]!r} is no message of a rank")


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _named(ranks: Iterable[int]) -> str:
    found = sorted(ranks)
    return f"rank {found[0]}" if len(found) == 1 else f"ranks {', '.join(map(str, found))}"


def _watch_silence(connection: socket.socket) -> None:
    """End a connection whose other machine has gone without a word, within seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _SILENT_PROBES)


def _loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
