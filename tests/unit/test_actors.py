"""Groups of Ray actors: acts on all of them, and what is said of one that is late, dead or wrong."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'unitrain[ray]'", allow_module_level=True)

import ray

from unitrain.actors import cluster_ray
from unitrain.actors.cluster_ray import private_or_running
from unitrain.actors.group_ray import ActorGroup, NoRoom
from unitrain.actors.waiting_ray import ActorLost, ActorSilent, wait
from unitrain.errors import UnknownName, UserError


class Counter:
    """Of the test's own; it is sent to the actors by value where the module cannot be imported there."""

    def __init__(self, first: int) -> None:
        self.first = first
        print(f"counting from {first}", flush=True)

    def plus(self, number: int) -> int:
        return self.first + number

    def tens(self, rows: list[int]) -> list[int]:
        return [10 * row for row in rows]

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self, kind: str) -> None:
        if kind == "ours":
            raise UnknownName("model", "gtp", ["gpt"])
        if kind != "first" or self.first == 0:
            raise KeyError(f"{kind} {self.first}")
        time.sleep(60)

    def parts(self, number: int) -> Iterator[list[int]]:
        yield from ([self.first, part] for part in range(number))

    def variables(self) -> list[str]:
        return [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]

    def where(self) -> tuple[str, int]:
        return os.getcwd(), os.getpid()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("SLURM_PROCID", "7")
        with private_or_running(None, cpus=5, name="test", object_store_bytes=80 << 20) as found:
            yield found


@pytest.fixture(scope="module")
def pair(cluster: Any) -> Iterator[ActorGroup]:
    group = ActorGroup(Counter, 2, args=lambda index: (10 * index,))
    yield group
    group.kill()


def test_a_private_cluster_listens_to_this_machine_alone_and_asks_for_a_token(cluster: Any) -> None:
    assert cluster.private
    assert cluster.address.startswith("127.0.0.2:")
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not (Path.home() / ".ray" / "auth_token").exists()


def test_a_cluster_that_this_process_has_is_used_and_left_as_it_is(cluster: Any) -> None:
    with private_or_running("127.0.0.1:1", cpus=1, name="other") as found:
        assert (found.address, found.private) == (cluster.address, False)
    assert ray.is_initialized()


def test_every_actor_acts_and_answers_come_in_order(pair: ActorGroup) -> None:
    assert pair.call("plus", 1) == [1, 11]
    assert pair.first("plus", 5) == 5
    assert pair.one(1, "plus", 5) == 15
    assert pair.split("tens", [1, 2, 3]) == [[10], [20, 30]]
    assert pair.gather("tens", [1, 2, 3]) == [10, 20, 30]
    streams = pair.streams("parts", 2, seconds=30, what="streaming")
    assert [ray.get(stream) for stream in streams] == [[[0, 0], [0, 1]], [[10, 0], [10, 1]]]


def test_actors_are_no_ranks_of_slurm_and_work_where_we_do(pair: ActorGroup) -> None:
    assert os.environ["SLURM_PROCID"] == "7", "ours is as it was"
    assert pair.call("variables") == [[], []]
    assert [folder for folder, _ in pair.call("where")] == [os.getcwd()] * 2
    assert [pid for _, pid in pair.call("where")] == [member.pid for member in pair.members]


def test_an_error_of_the_function_is_raised_as_it_is_with_its_traceback(pair: ActorGroup) -> None:
    with pytest.raises(KeyError, match="all") as caught:
        pair.call("fail", "all")
    assert "raised in counter[" in caught.value.__notes__[0]
    assert "in fail" in caught.value.__notes__[0]


def test_the_first_error_is_not_waited_for_by_those_that_go_on(pair: ActorGroup) -> None:
    began = time.monotonic()
    group = ActorGroup(Counter, 1, args=(0,))
    refs = [*group.start("fail", "first"), *group.start("plus", 1)]
    with pytest.raises(KeyError, match="first 0"):
        wait(refs, names=["a", "b"], seconds=30, what="waiting")
    group.kill()
    assert time.monotonic() - began < 20


def test_our_own_errors_come_through_whole(pair: ActorGroup) -> None:
    with pytest.raises(UnknownName, match="did you mean 'gpt'"):
        pair.first("fail", "ours")


def test_who_is_late_is_named_with_stack_and_last_words(pair: ActorGroup) -> None:
    with pytest.raises(ActorSilent) as caught:
        pair.call("sleep", 3, seconds=1, what="counting")
    message = str(caught.value)
    assert message.startswith(f"counter[0] (pid {pair.members[0].pid} on {pair.members[0].host}) did not answer")
    assert "within 1 s while counting (nor did counter[1]" in message
    assert "in sleep" in message, "its stack"
    assert "counting from 0" in message, "its log"
    assert pair.call("plus", 0, seconds=30) == [0, 10], "it is none the worse for having been asked"


def test_who_dies_is_named_and_a_group_ends_even_when_it_is_stopped(cluster: Any) -> None:
    group = ActorGroup(Counter, 2, name="worker", args=(3,))
    refs = group.start("sleep", 30)
    os.kill(group.members[1].pid, signal.SIGKILL)
    with pytest.raises(ActorLost, match=r"^worker\[1\] \(pid \d+ on .*\) was lost while sleeping") as caught:
        group.result(refs, seconds=20, what="sleeping")
    assert caught.value.pid == group.members[1].pid
    assert "counting from 3" in str(caught.value)
    os.kill(group.members[0].pid, signal.SIGSTOP)
    group.kill()
    assert not any(is_running(member.pid) for member in group.members)


def test_an_actor_that_is_stopped_is_found_silent_long_before_its_time_is_up(cluster: Any) -> None:
    group = ActorGroup(Counter, 1, name="worker", args=(3,))
    ticks: list[float] = []
    began = time.monotonic()
    os.kill(group.members[0].pid, signal.SIGSTOP)
    with pytest.raises(ActorSilent, match="is stopped"):
        group.result(group.start("plus", 1), seconds=100, what="adding", silent_seconds=2, tick=lambda: ticks.append(0))
    assert time.monotonic() - began < 20
    assert ticks
    group.kill()


def test_a_group_without_room_says_what_there_is(cluster: Any) -> None:
    with pytest.raises(NoRoom, match=r"2 actors 'counter' of 2 CPU each \(PACK\).*it has 5 CPU"):
        ActorGroup(Counter, 2, resources={"CPU": 2}, args=(1,), room_seconds=0.5)


def test_addresses_where_no_cluster_is_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"no Ray cluster at '127\.0\.0\.1:9'"):
        cluster_ray._join("127.0.0.1:9", "test")
    with pytest.raises(UserError, match="Ray Client"):
        cluster_ray._join("ray://127.0.0.1:10001", "test")


def test_what_killed_owners_left_is_swept_away(tmp_path: Path) -> None:
    gone, ours, foreign = (tmp_path / name for name in ("uray-999999999-a", f"uray-{os.getpid()}-b", "uray-x"))
    for folder in (gone, ours, foreign):
        folder.mkdir()
    cluster_ray._sweep(str(tmp_path))
    assert [folder.exists() for folder in (gone, ours, foreign)] == [False, True, True]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
