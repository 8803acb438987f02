"""How ranks find each other for Horovod: the store that Gloo asks, the interface, and horovodrun's variables."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator

import psutil
import pytest
import torch

from unitrain.strategies._torch_horovod import KeyValueServer, interface
from unitrain.world import World

pytestmark = pytest.mark.fast


@pytest.fixture
def server() -> Iterator[KeyValueServer]:
    with contextlib.closing(KeyValueServer("127.0.0.1")) as found:
        yield found


def ask(server: KeyValueServer, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    with contextlib.closing(connection):
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_a_key_is_missing_until_it_is_put_and_again_once_it_is_deleted(server: KeyValueServer) -> None:
    assert ask(server, "GET", "/global/0")[0] == 404
    assert ask(server, "PUT", "/global/0", b"\x00address\xff")[0] == 200
    assert ask(server, "GET", "/global/0") == (200, b"\x00address\xff")
    assert ask(server, "GET", "/local/0")[0] == 404
    assert ask(server, "DELETE", "/global/0")[0] == 200
    assert ask(server, "GET", "/global/0")[0] == 404


def test_many_ranks_may_ask_at_once(server: KeyValueServer) -> None:
    def rank(number: int) -> None:
        ask(server, "PUT", f"/global/{number}", str(number).encode())

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ask(server, "GET", f"/global/{number}")[1] for number in range(32)] == [b"%d" % n for n in range(32)]


def test_a_closed_store_listens_no_more() -> None:
    server = KeyValueServer("127.0.0.1")
    server.close()
    with pytest.raises(ConnectionRefusedError):
        ask(server, "GET", "/global/0")


def test_this_machine_is_reached_by_its_loopback_interface() -> None:
    assert "127.0.0.1" in {each.address for each in psutil.net_if_addrs()[interface("127.0.0.1")]}


HOROVODRUN = {
    "HOROVOD_RANK": "3",
    "HOROVOD_SIZE": "4",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_CROSS_RANK": "1",
    "HOROVOD_CROSS_SIZE": "2",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
    "HOROVOD_GLOO_RENDEZVOUS_PORT": "24730",
}


def test_a_rank_of_horovodrun_knows_its_place() -> None:
    world = World.from_environment(HOROVODRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)
    assert (world.node, world.nodes, world.starter) == (1, 2, "horovodrun")


def test_ranks_of_horovodrun_agree_on_a_port_that_horovodrun_does_not_hold() -> None:
    host, port = World.from_environment(HOROVODRUN).coordinator_address
    assert host == "10.0.0.1"
    assert port != 24730
    assert World.from_environment({**HOROVODRUN, "HOROVOD_RANK": "0"}).coordinator_address == (host, port)


def test_our_own_agents_word_counts_for_more_than_what_horovod_was_told() -> None:
    ours = {"RANK": "0", "WORLD_SIZE": "1", "UNITRAIN_AGENT_FD": "5"}
    assert World.from_environment({**HOROVODRUN, **ours}).starter == "agent"


def test_buckets_follow_backward_and_hold_one_dtype_each() -> None:
    horovod = pytest.importorskip("unitrain.strategies.horovod", exc_type=ImportError)
    shapes = [(4, torch.float32), (4, torch.bfloat16), (4, torch.float32), (100, torch.float32), (4, torch.float32)]
    params = [torch.zeros(size, dtype=dtype) for size, dtype in shapes]
    assert horovod.plan(params, 32) == [[4], [3], [2, 0], [1]]
    assert horovod.plan(params, 2**20) == [[4, 3, 2, 0], [1]]
    assert horovod.plan(params, 0) == [[4], [3], [2], [1], [0]]
