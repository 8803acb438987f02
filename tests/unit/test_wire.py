"""Agents only hear what an agent of their run has said, once and in order."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unitrain.agent.interfaces import interface_of
from unitrain.agent.team import meeting_place
from unitrain.agent.wire import KEY, Channel, ChannelEnded, admit, approach, make_key, read_key
from unitrain.errors import UserError

pytestmark = pytest.mark.fast
OURS, ANOTHER = b"a" * 64, b"b" * 64
Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Callable[..., Pair]]:
    made: list[socket.socket] = []

    def connect(first: bytes = OURS, second: bytes = OURS) -> Pair:
        here, there = socket.socketpair()
        made.extend((here, there))
        channels: list[Channel] = []
        thread = threading.Thread(target=lambda: channels.append(admit(here, first)))
        thread.start()
        ours = approach(there, second)
        thread.join()
        return channels[0], ours

    yield connect
    for end in made:
        end.close()


def raw(channel: Channel) -> socket.socket:
    return channel._connection


def test_messages_come_as_they_were_sent_both_ways(pair: Callable[..., Pair]) -> None:
    first, second = pair()
    for number in range(3):
        first.send({"number": number, "text": "ä\n"})
        second.send({"back": number})
    assert [second.receive() for _ in range(3)] == [{"number": number, "text": "ä\n"} for number in range(3)]
    assert [first.receive() for _ in range(3)] == [{"back": number} for number in range(3)]


def test_who_does_not_know_the_key_is_not_heard(pair: Callable[..., Pair]) -> None:
    first, second = pair(OURS, ANOTHER)
    second.send({"kind": "end"})
    with pytest.raises(ChannelEnded, match="not signed by this run"):
        first.receive()


@pytest.mark.parametrize("what", ["again", "order", "changed", "reflected", "elsewhere", "cut"])
def test_a_message_counts_once_in_its_place_and_unchanged(pair: Callable[..., Pair], what: str) -> None:
    first, second = pair()
    second.send({"number": 0})
    second.send({"number": 1})
    lines = raw(first).recv(10_000).splitlines(keepends=True)
    sent = {
        "again": lines[0] + lines[0],
        "order": lines[1] + lines[0],
        "changed": lines[0].replace(b'"number": 0', b'"number": 9'),
        "reflected": b"",
        "elsewhere": b"",
        "cut": lines[0][:-5],
    }[what]
    receiver, sender = first, second
    if what == "reflected":  # to who sent it
        receiver, sender, sent = second, first, lines[0]
    elif what == "elsewhere":  # another connection of the same run
        receiver, sender = pair()
        sent = lines[0]
    raw(sender).sendall(sent)
    raw(sender).shutdown(socket.SHUT_WR)
    if what == "again":
        assert receiver.receive() == {"number": 0}
    with pytest.raises(ChannelEnded):
        receiver.receive()


@pytest.mark.parametrize("body", [b"[1]", b"{", b"[" * 100_000, b"\xff"])
def test_what_is_no_message_ends_the_connection(pair: Callable[..., Pair], body: bytes) -> None:
    from unitrain.agent.wire import _code

    first, second = pair()
    raw(second).sendall(_code(second._sending, 0, body) + body + b"\n")
    with pytest.raises(ChannelEnded, match="no message"):
        first.receive()


def test_silence_ends_a_connection(pair: Callable[..., Pair]) -> None:
    first, _ = pair()
    first.wait_at_most(0.05)
    with pytest.raises(ChannelEnded, match="said nothing for too long"):
        first.receive()


@pytest.mark.parametrize("word", [b"", b"\n", b"x" * 33, b"HTTP/1.1 400 Bad Request\r\n" * 9])
def test_what_does_not_greet_as_an_agent_is_none(word: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(word)
        there.shutdown(socket.SHUT_WR)
        with pytest.raises(ChannelEnded, match="no agent of unitrain"):
            approach(here, OURS)


def test_a_key_is_made_once_and_read_by_nobody_else(tmp_path: Path) -> None:
    key = make_key(tmp_path)
    assert make_key(tmp_path) == read_key(tmp_path, 0) == key
    assert len(key) == 64
    assert (tmp_path / KEY).stat().st_mode & 0o777 == 0o600


def test_a_missing_or_a_damaged_key_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not in a folder that all nodes share"):
        read_key(tmp_path, 0)
    (tmp_path / KEY).write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="is damaged"):
        read_key(tmp_path, 0)


def test_a_meeting_place_is_a_host_and_a_port() -> None:
    assert meeting_place("node-1:29500") == ("node-1", 29500)
    assert meeting_place("[fe80::1]:1") == ("fe80::1", 1)
    for text in ("", "node-1", ":1", "node-1:", "node-1:0", "node-1:65536", "node-1:x", "node-1:-1"):
        with pytest.raises(UserError, match="must be HOST:PORT"):
            meeting_place(text)


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == interface_of("::ffff:127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
