"""A Ray cluster of our own on this machine: a head with the Jobs API, and logical nodes that can be lost."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from unitrain.meeting import free_port

from .machine import processes, turn

ROOT = Path(__file__).resolve().parents[2]
MARK = "UNITRAIN_TEST_RAY_NODE"  # in the environment of all that runs on a logical node
START_SECONDS, END_SECONDS = 90.0, 15.0
LOOPBACK = "127.0.0.1"
NODE_ADDRESS = "127.0.0.{}"  # of nodes from 2; Ray would take the first for the machine's own address


class Cluster:
    """Nodes node-1, node-2, ... of one CPU each while entered; the head has none."""

    def __init__(self, *, nodes: int = 2, cpus: int = 1) -> None:
        self._num_nodes, self._cpus = nodes, cpus
        self.names: list[str] = []
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._name = secrets.token_hex(4)
        self._token = secrets.token_hex(32)

    def __enter__(self) -> Cluster:
        pytest.importorskip("ray", reason="not run: Ray is not installed")
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(turn("Ray"))
            self.folder = Path(tempfile.mkdtemp(prefix="uray-", dir="/tmp"))  # short: sockets lie in it
            self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._stack.callback(self._down)
            self._up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def environ(self) -> dict[str, str]:
        """What whoever submits has to know."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token, "OMP_NUM_THREADS": "1"}

    @property
    def address(self) -> str:
        """Of the Jobs API."""
        return f"http://{LOOPBACK}:{self._dashboard}"

    def add(self) -> str:
        """Another logical node; its name."""
        name = f"node-{len(self.names) + 1}"
        self.names.append(name)
        self._ray(name, f"--address={NODE_ADDRESS.format(2)}:{self._gcs}", f"--num-cpus={self._cpus}")
        return name

    def lose(self, name: str) -> None:
        """Kill all that runs on a node at once, as a power failure does."""
        found = self.pids(name)
        while found:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._started[name].wait(END_SECONDS)
            found = self.pids(name)  # what was started meanwhile

    def pids(self, name: str) -> list[int]:
        """Of all processes on a node, ranks among them."""
        mark, parents, found = f"{MARK}={self._name}/{name}\0".encode(), dict[int, int](), {self._started[name].pid}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if fields[0] == "Z":
                    continue
                parents[int(path.name)] = int(fields[1])
                if mark in (path / "environ").read_bytes():
                    found.add(int(path.name))
        # Some of Ray's processes write their title over their environment.
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return sorted(found & parents.keys())

    def wait_for_nodes(self, number: int) -> None:
        """Until so many nodes beside the head are there."""
        deadline = time.monotonic() + START_SECONDS
        while (there := len(self._alive()) - 1) != number:
            assert time.monotonic() < deadline, f"{there} of {number} nodes are there after {START_SECONDS:g} s"
            time.sleep(0.3)

    def _alive(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError, KeyError):
            nodes = self._ask("/nodes?view=summary")["data"]["summary"]
            return [node for node in nodes if node["raylet"]["state"] == "ALIVE"]
        return []

    def _ask(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self._token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    def _up(self) -> None:
        self._gcs, self._dashboard = free_port(LOOPBACK), free_port(LOOPBACK)
        head = self._ray(
            "head",
            "--head",
            f"--port={self._gcs}",
            "--num-cpus=0",
            "--include-dashboard=true",
            f"--dashboard-host={LOOPBACK}",
            f"--dashboard-port={self._dashboard}",
            f"--temp-dir={self.folder}",
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._alive():
            said = (self.folder / "head.log").read_text(errors="replace")[-3000:]
            assert head.poll() is None and time.monotonic() < deadline, f"the head of Ray did not start:\n{said}"
            time.sleep(0.3)
        for number in range(1, self._num_nodes + 1):
            self.add()
            self.wait_for_nodes(number)  # two that start at once may choose the same name for a socket

    def _ray(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *words),
            f"--node-ip-address={NODE_ADDRESS.format(2 + len(self.names))}",
            f"--object-store-memory={80 << 20}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--dashboard-agent-listen-port={free_port(LOOPBACK)}",
        ]
        ours = {
            **self.environ,
            MARK: f"{self._name}/{name}",
            "PYTHONPATH": str(ROOT),
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        del ours["OMP_NUM_THREADS"]  # as on real nodes: Ray then sets it as it likes
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "OMP_"))}
        with (self.folder / f"{name}.log").open("wb") as log:
            self._started[name] = subprocess.Popen(
                command,
                env=kept | ours,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self._started[name]

    def _down(self) -> None:
        """By number, and only ours: `ray stop` would end every Ray of this machine."""
        for name in reversed(self._started):
            self.lose(name)


class System:
    """For the tests that every launcher must pass."""

    nodes, nproc = 2, 1
    patience_seconds = 120.0
    detaches, process = True, False

    def __init__(self) -> None:
        self._cluster = Cluster(nodes=2)

    def __enter__(self) -> System:
        self._cluster.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._cluster.__exit__(*error)

    @property
    def environ(self) -> Mapping[str, str]:
        return self._cluster.environ

    @property
    def options(self) -> dict[str, Any]:
        return {"address": self._cluster.address, "environment": ["OMP_NUM_THREADS"], "rejoin_seconds": 30}

    def folder(self, here: Path) -> Path:
        return here  # the nodes see this machine's disk

    def left(self, run_dir: Path) -> list[str]:
        return processes(run_dir)
