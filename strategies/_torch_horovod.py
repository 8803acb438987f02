"""How the ranks of a Horovod run meet without horovodrun: what its Gloo asks of whoever starts it."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

from unitrain.errors import UserError
from unitrain.strategies._torch import store_of
from unitrain.world import LOOPBACK, World


class KeyValueServer:
    """The HTTP store in which Gloo's ranks leave their addresses: PUT, GET and DELETE of /scope/key.

    A key that nobody has put yet is a 404: ranks ask again.
    """

    def __init__(self, host: str) -> None:
        self._server = _Server((host, 0), _Request)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens; the system chose it."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop; what was stored is gone."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # all ranks come at once

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.values: dict[str, bytes] = {}


class _Request(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_PUT(self) -> None:
        self.server.values[self.path] = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(200)

    def do_GET(self) -> None:
        value = self.server.values.get(self.path)
        self._answer(404 if value is None else 200, value or b"")

    def do_DELETE(self) -> None:
        self.server.values.pop(self.path, None)
        self._answer(200)

    def log_message(self, format: str, *args: Any) -> None:
        """Not a word: every rank asks many times a second."""

    def _answer(self, code: int, body: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def meeting(world: World, timeout: datetime.timedelta) -> Iterator[dict[str, str]]:
    """The variables from which Gloo finds the other ranks; rank 0 serves the store while the context lasts.

    Leave it when all ranks have met. Every rank is here before any goes on, however slowly it has started.
    """
    host = socket.gethostbyname(world.coordinator_address[0]) if world.nodes > 1 else LOOPBACK
    if world.nodes > 1 and host.startswith("127."):
        raise UserError(
            f"{world.nodes} nodes cannot meet at {world.coordinator}, which is {host} on this one; set MASTER_ADDR to "
            "an address by which the others reach the node of rank 0"
        )
    # torch's own store first: under torchrun the coordinator's port belongs to torchrun.
    store = store_of(world.coordinator, world.rank, world.size)
    # The store outlives a meeting, and another may follow.
    number = store.add(f"unitrain/horovod/{world.generation}/meetings-of-{world.rank}", 1)
    prefix = f"unitrain/horovod/{world.generation}/{number}"
    with contextlib.ExitStack() as stack:
        if world.first:
            server = stack.enter_context(contextlib.closing(KeyValueServer(host if world.nodes == 1 else "")))
            store.set(f"{prefix}/port", str(server.port))
        store.set(f"{prefix}/{world.rank}", "here")
        store.wait([f"{prefix}/{rank}" for rank in range(world.size)], timeout)
        yield {
            "HOROVOD_RANK": str(world.rank),
            "HOROVOD_SIZE": str(world.size),
            "HOROVOD_LOCAL_RANK": str(world.local_rank),
            "HOROVOD_LOCAL_SIZE": str(world.local_size),
            "HOROVOD_CROSS_RANK": str(world.node),
            "HOROVOD_CROSS_SIZE": str(world.nodes),
            "HOROVOD_HOSTNAME": f"node-{world.node}",  # only tells which ranks share a node
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": host,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": store.get(f"{prefix}/port").decode(),
            "HOROVOD_GLOO_IFACE": interface(host),
        }


def interface(host: str) -> str:
    """The network interface by which this machine reaches a host: `lo`, `eth0`. Raises UserError without one."""
    import psutil  # Horovod brings it

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own: str = probe.getsockname()[0]
    names: list[str] = [
        name for name, found in psutil.net_if_addrs().items() if own in {each.address for each in found}
    ]
    if not names:
        raise UserError(f"no network interface of this machine has the address {own}, by which it reaches {host}")
    return names[0]
