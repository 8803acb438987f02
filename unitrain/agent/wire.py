"""Messages between the agents of one run: lines of JSON, each with a code that only who knows the run's key can make.

Nothing is parsed before its code is checked. The codes (HMAC-SHA256, RFC 2104) rest on a random word of either side and
on the message's number, so that no message can be sent again, out of its order, back to its sender, or into another
connection. Contents are not hidden: they hold no secret.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

KEY = "agent.key"  # in the run's folder; whoever can read that folder may take part in the run
_KEY_LETTERS = 64
_WORD_LETTERS = 32
_CODE_LETTERS = 64
_MOST_BYTES = 8 << 20  # of one message
_PIECE_BYTES = 1 << 20
_POLL_SECONDS, _WRITING_SECONDS = 0.1, 2.0


class ChannelEnded(Exception):
    """The other side is gone, silent, or not who it should be."""


class Channel:
    """One connection, from either side. One thread may send while another receives."""

    def __init__(self, connection: socket.socket, lines: BinaryIO, *, sending: bytes, receiving: bytes) -> None:
        self._connection, self._lines = connection, lines
        self._sending, self._receiving = sending, receiving
        self._sent = self._received = 0
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """The address of this side."""
        return str(self._connection.getsockname()[0])

    @property
    def peer(self) -> str:
        """The address of the other side."""
        return str(self._connection.getpeername()[0]).removeprefix("::ffff:")  # of IPv4 on a socket for both

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. Raises ChannelEnded."""
        body = json.dumps(message).encode()
        with self._lock:
            line = _code(self._sending, self._sent, body) + body + b"\n"
            self._sent += 1
            try:
                self._connection.sendall(line)
            except OSError as error:
                raise ChannelEnded(_how(error)) from error

    def receive(self) -> dict[str, Any]:
        """Wait for the next message. Raises ChannelEnded, also when nothing came for as long as the timeout says."""
        try:
            line = self._lines.readline(_MOST_BYTES)
        except (OSError, ValueError) as error:  # ValueError: closed by another thread
            raise ChannelEnded(_how(error)) from error
        if not line:
            raise ChannelEnded("its connection has ended")
        code, body = line[:_CODE_LETTERS], line[_CODE_LETTERS:-1]
        if not line.endswith(b"\n") or not hmac.compare_digest(code, _code(self._receiving, self._received, body)):
            raise ChannelEnded("what it sent is not signed by this run")
        self._received += 1
        message = _understood(body)
        if message is None:
            raise ChannelEnded("what it sent is no message")
        return message

    def send_file(self, fd: int, offset: int, count: int) -> None:
        """Send that many bytes of a file, unsigned, after a message that told how many. Raises ChannelEnded."""
        with self._lock, open(fd, "rb", closefd=False) as file:
            try:
                sent = self._connection.sendfile(file, offset, count)
            except OSError as error:
                raise ChannelEnded(_how(error)) from error
        if sent != count:
            raise ChannelEnded("the file has ended before")

    def receive_bytes(self, count: int) -> bytes:
        """That many bytes that follow a message. Raises ChannelEnded."""
        try:
            found = self._lines.read(count)
        except (OSError, ValueError) as error:
            raise ChannelEnded(_how(error)) from error
        if len(found) < count:
            raise ChannelEnded("its connection has ended")
        return found

    def receive_file(self, fd: int, offset: int, count: int) -> None:
        """Write as many bytes that follow a message to a file. Raises ChannelEnded; OSError where there is no room."""
        piece = memoryview(bytearray(min(count, _PIECE_BYTES)))
        while count:
            try:
                found = self._lines.readinto(piece[:count])  # type: ignore[attr-defined]  # a BufferedReader
            except (OSError, ValueError) as error:
                raise ChannelEnded(_how(error)) from error
            if not found:
                raise ChannelEnded("its connection has ended")
            rest = piece[:found]
            while rest:
                written = os.pwrite(fd, rest, offset)
                rest, offset = rest[written:], offset + written
            count -= found

    def wait_at_most(self, seconds: float) -> None:
        """How long a message may take to come or to go."""
        self._connection.settimeout(seconds)

    def close(self) -> None:
        """End the connection, also for a thread that waits for it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def listen(port: int) -> socket.socket:
    """A socket that listens on all addresses of this machine, of either family; port 0: a free one. Raises OSError."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be compiled in and switched off
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def admit(connection: socket.socket, key: bytes) -> Channel:
    """The side that listens. Raises ChannelEnded for a stranger; its hello is the first message."""
    challenge = secrets.token_hex(_WORD_LETTERS // 2).encode()
    lines = connection.makefile("rb")
    with _closed_if_not(connection):
        connection.sendall(challenge + b"\n")
        word = _word(lines)
    return _channel(connection, lines, key, challenge + word, (b"down", b"up"))


def approach(connection: socket.socket, key: bytes) -> Channel:
    """The side that connects. Raises ChannelEnded where what listens there is no agent."""
    lines = connection.makefile("rb")
    word = secrets.token_hex(_WORD_LETTERS // 2).encode()
    with _closed_if_not(connection):
        challenge = _word(lines)
        connection.sendall(word + b"\n")
    return _channel(connection, lines, key, challenge + word, (b"up", b"down"))


def make_key(run_dir: Path) -> bytes:
    """The run's key, made where there is none yet. Raises UserError for a damaged one."""
    try:
        fd = os.open(run_dir / KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_key(run_dir, _WRITING_SECONDS)  # of an attempt before
    with open(fd, "w") as file:
        file.write(secrets.token_hex(_KEY_LETTERS // 2))
    return read_key(run_dir, 0)


def read_key(run_dir: Path, seconds: float) -> bytes:
    """The run's key, which may take a while to be seen from here. Raises UserError."""
    path, deadline = run_dir / KEY, time.monotonic() + seconds
    while True:
        try:
            key = path.read_text(errors="replace")
        except FileNotFoundError:
            key = ""
        if len(key) == _KEY_LETTERS:
            return key.encode()
        if time.monotonic() >= deadline:
            break
        time.sleep(_POLL_SECONDS)
    if key:
        raise UserError(f"{path} is damaged; remove it and start the run again")
    raise UserError(
        f"{path} is not there after {seconds:.0f} s: either node 0 has not started, or {run_dir} is not in a folder "
        "that all nodes share"
    )


@contextlib.contextmanager
def _closed_if_not(connection: socket.socket) -> Iterator[None]:
    """Close the connection where the greeting fails, and say so as ChannelEnded."""
    try:
        yield
    except ChannelEnded:
        connection.close()
        raise
    except OSError as error:
        connection.close()
        raise ChannelEnded(_how(error)) from error


def _channel(
    connection: socket.socket, lines: BinaryIO, key: bytes, words: bytes, ways: tuple[bytes, bytes]
) -> Channel:
    sending, receiving = (hmac.digest(key, way + words, "sha256") for way in ways)
    return Channel(connection, lines, sending=sending, receiving=receiving)


def _word(lines: BinaryIO) -> bytes:
    word = lines.readline(_WORD_LETTERS + 1)
    if len(word) != _WORD_LETTERS + 1 or not word.endswith(b"\n"):
        raise ChannelEnded("it is no agent of unitrain")
    return word[:-1]


def _understood(body: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _code(key: bytes, number: int, body: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "big") + body, "sha256").hex().encode()


def _how(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it has said nothing for too long"
    return f"its connection has ended ({error})"
