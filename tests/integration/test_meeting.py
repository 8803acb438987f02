"""Ranks that meet: real processes that talk, come late, fail, leave and are killed."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from unitrain.errors import ExitCode, UserError
from unitrain.meeting import Meeting, PeerLost, free_port
from unitrain.world import World

# A rank that does what it is told, a line each, and says what came of it: begins, answers, and losses at any time.
RANK = """
import json, sys, time
from unitrain.meeting import Meeting, PeerLost
from unitrain.errors import UnitrainError
from unitrain.world import World

def say(**what):
    sys.stdout.write(json.dumps(what) + "\\n")  # in one piece: several threads speak
    sys.stdout.flush()

def lost(error):
    say(lost=str(error), at=time.monotonic())

rank, size, port, timeout = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
try:
    meeting = Meeting(World(rank=rank, size=size, coordinator=f"127.0.0.1:{port}"), timeout=timeout, lost=lost)
except UnitrainError as error:
    say(error=str(error), code=error.exit_code, at=time.monotonic())
    sys.exit(error.exit_code)
say(joined=rank)
for line in sys.stdin:
    verb, *args = json.loads(line)
    try:
        if verb == "fail":
            raise RuntimeError("as told")
        say(answer=getattr(meeting, verb)(*args), at=time.monotonic())
    except RuntimeError:
        meeting.close()
        say(answer=None)
    except PeerLost as error:
        say(error=str(error), code=error.exit_code, at=time.monotonic())
"""


class Rank:
    """One of those processes."""

    def __init__(self, rank: int, size: int, port: int, timeout: float = 30.0) -> None:
        command = [sys.executable, "-c", RANK, str(rank), str(size), str(port), str(timeout)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, verb: str, *args: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([verb, *args]) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def kill(self) -> float:
        """When it was killed."""
        now = time.monotonic()
        self.process.send_signal(signal.SIGKILL)
        return now

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Group:
    """Ranks of one run."""

    def __init__(self) -> None:
        self.port = free_port("127.0.0.1")
        self.ranks: list[Rank] = []

    def start(self, rank: int, size: int, timeout: float = 30.0) -> Rank:
        self.ranks.append(Rank(rank, size, self.port, timeout))
        return self.ranks[-1]

    def meet(self, size: int) -> list[Rank]:
        ranks = [self.start(rank, size) for rank in range(size)]
        assert [rank.hear() for rank in ranks] == [{"joined": rank} for rank in range(size)]
        return ranks


@pytest.fixture
def group() -> Iterator[Group]:
    found = Group()
    yield found
    for rank in found.ranks:
        rank.end()


@pytest.fixture
def trio(group: Group) -> list[Rank]:
    return group.meet(3)


def answers(ranks: list[Rank]) -> list[Any]:
    return [rank.hear()["answer"] for rank in ranks]


def test_ranks_talk_in_order_and_part_without_a_loss(trio: list[Rank]) -> None:
    for number, rank in enumerate(trio):
        rank.tell("gather", {"rank": number, "text": "a\nb" * number})
    assert answers(trio) == [[{"rank": number, "text": "a\nb" * number} for number in range(3)]] * 3
    for number, rank in enumerate(trio):
        rank.tell("share", f"of {number}")
    assert answers(trio) == ["of 0"] * 3
    # More than any buffer holds, from all at once.
    for rank in trio:
        rank.tell("gather", "x" * 3_000_000)
    assert answers(trio) == [["x" * 3_000_000] * 3] * 3
    for rank in trio[1:]:
        rank.tell("barrier")
    time.sleep(0.3)
    trio[0].tell("barrier")
    came = [rank.hear()["at"] for rank in trio]
    assert max(came) - min(came) < 0.25
    # In any order: who leaves first has lost nobody, and nobody has lost it.
    for rank in (trio[1], trio[0], trio[2]):
        rank.tell("close")
        assert rank.hear()["answer"] is None
    for rank in trio:
        rank.tell("close")
        assert rank.hear()["answer"] is None
        out, _ = rank.process.communicate(timeout=10)
        assert (out, rank.process.returncode) == ("", 0)


@pytest.mark.parametrize("killed", [0, 2])
def test_the_others_notice_within_a_second_that_a_rank_was_killed(trio: list[Rank], killed: int) -> None:
    others = [rank for number, rank in enumerate(trio) if number != killed]
    others[1].tell("barrier")  # one waits for all, the other is busy
    time.sleep(0.2)
    at = trio[killed].kill()
    for rank in others:
        said = [rank.hear()] if rank is others[0] else [rank.hear(), rank.hear()]
        for each in said:
            assert (each.get("lost") or each["error"]) == f"rank {killed} has gone without a word; its log says why"
            assert each["at"] - at < 1
    for rank in others:  # and whoever waits later does not wait
        rank.tell("barrier")
        found = rank.hear()
        assert found["error"] == f"rank {killed} has gone without a word; its log says why"
        assert found["code"] == ExitCode.FAILED


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_and_closes_leaves_nobody_waiting(trio: list[Rank], failing: int) -> None:
    others = [rank for number, rank in enumerate(trio) if number != failing]
    others[0].tell("barrier")
    time.sleep(0.2)
    trio[failing].tell("fail")
    message = f"rank {failing} has failed; its log says why"
    assert others[0].hear()["error"] == message
    assert trio[failing].hear() == {"answer": None}
    # Whoever waits elsewhere, in a collective of the framework, is told as well, once it had the time to fail itself.
    assert [rank.hear()["lost"] for rank in others] == [message] * 2
    others[1].tell("barrier")
    assert others[1].hear()["error"] == message


def test_who_waits_for_a_rank_that_has_left_in_good_order_is_told(trio: list[Rank]) -> None:
    for rank in trio[:2]:
        rank.tell("barrier")
    time.sleep(0.2)
    trio[2].tell("close")
    message = "rank 2 has left while others wait for it; its log says why"
    assert [rank.hear()["error"] for rank in trio[:2]] == [message] * 2
    trio[0].tell("close")  # nothing was lost
    assert trio[0].hear()["answer"] is None


def test_ranks_that_start_late_are_waited_for_and_missing_ones_are_named(group: Group) -> None:
    late = group.start(1, 2)
    time.sleep(1)
    first = group.start(0, 2)
    assert [first.hear(), late.hear()] == [{"joined": 0}, {"joined": 1}]

    alone = Group()
    group.ranks += [alone.start(0, 4, 1.5), alone.start(2, 4, 30.0)]
    said = group.ranks[2].hear()
    assert said["error"] == f"ranks 1, 3 did not come to 127.0.0.1:{alone.port} in time; see their logs"
    assert said["code"] == ExitCode.BAD_RECIPE
    assert group.ranks[3].hear()["error"] == "rank 0 has failed; its log says why"


def test_rank_0_that_never_comes_is_named() -> None:
    where = f"127.0.0.1:{free_port('127.0.0.1')}"
    began = time.monotonic()
    with pytest.raises(UserError, match=f"rank 0 does not answer at {where}: .*refused"):
        Meeting(World(rank=1, size=2, coordinator=where), timeout=0.5)
    assert time.monotonic() - began < 3


def test_a_taken_port_is_said_to_be_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot listen at {where}, where something else does; .*MASTER_PORT"):
            Meeting(World(rank=0, size=2, coordinator=where), timeout=0.5)
        # and what holds it is not mistaken for rank 0, even if it takes every connection
        with pytest.raises(UserError, match=f"at {where}: what listens there is not rank 0 of this run"):
            Meeting(World(rank=1, size=2, coordinator=where), timeout=0.5)


RUBBISH = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"5\n",
    b"[]\n",
    b'{"rank": true, "size": 2}\n',
    b'{"rank": 0, "size": 2}\n',
    b'{"rank": 2, "size": 2}\n',
    b'{"rank": 1, "size": 3}\n',  # of another run
    b'{"rank": 1}\n',
    b"[" * 190 + b"\n",
    b"\xff" * 4000,
]


def test_strangers_are_turned_away() -> None:
    world = World(rank=0, size=2, coordinator=f"127.0.0.1:{free_port('127.0.0.1')}")
    with meeting_in_background(world) as found:
        for text in RUBBISH:
            with knock(world) as stranger:
                stranger.sendall(text)
                if not text:
                    stranger.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(100) == b"", text
        with knock(world) as silent:
            partner = Meeting(World(rank=1, size=2, coordinator=world.coordinator), timeout=20)
            # Where rank 1 is already, there is no place for another, nor for anybody once all are there.
            with pytest.raises(OSError, match="refused"):
                knock(world).close()
            silent.close()
        found["thread"].join(10)
        threads = [threading.Thread(target=one.barrier) for one in (partner, found["meeting"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        partner.close()


def test_a_rank_alone_needs_nobody() -> None:
    meeting = Meeting(World())
    assert meeting.gather(5) == [5]
    assert meeting.share("x") == "x"
    meeting.barrier()
    meeting.close()
    meeting.close()


def test_nobody_talks_in_a_closed_meeting() -> None:
    world = World(rank=0, size=2, coordinator=f"127.0.0.1:{free_port('127.0.0.1')}")
    with meeting_in_background(world) as found:
        partner = Meeting(World(rank=1, size=2, coordinator=world.coordinator), timeout=20)
        found["thread"].join(10)
        partner.close()
        partner.close()
        with pytest.raises(PeerLost, match="has closed the meeting"):
            partner.barrier()


@contextlib.contextmanager
def meeting_in_background(world: World) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {}

    def meet() -> None:
        found["meeting"] = Meeting(world, timeout=60)

    found["thread"] = threading.Thread(target=meet)
    found["thread"].start()
    yield found
    found["thread"].join(10)
    found["meeting"].close()


def knock(world: World) -> socket.socket:
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(world.coordinator_address, timeout=10)
        time.sleep(0.02)
    raise ConnectionRefusedError("refused")
