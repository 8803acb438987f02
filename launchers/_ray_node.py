"""One node of a run, as a Ray actor in its bundle: it looks around, runs the node's agent, and passes signals on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unitrain import __version__
from unitrain.agent.records import hostname
from unitrain.world import environment

SEEN_SECONDS = 5.0  # a new file may take that long to be seen on another host
_POLL_SECONDS = 0.05
# What Ray tells its workers of themselves: a rank that connects to a cluster would take it for its own.
# A private Ray has room for the agents alone, so a rank must not take that for its cluster either.
_OF_THE_WORKER = ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_CLIENT_MODE", "RAY_WORKER_PROCESS_SETUP_HOOK")


class Node:
    """Its methods are coroutines: Ray runs several at once, all in one thread, which lives as long as the actor.

    The kernel ends the agent when the thread ends that has started it.
    """

    def __init__(self) -> None:
        self._agent: subprocess.Popen[bytes] | None = None

    async def look(self, run_dir: str, folder: str, nonce: str) -> dict[str, Any]:
        """Where this node is and, as `problem`, what keeps an agent from starting here."""
        import ray.util

        util: Any = ray.util  # this is untyped there
        seen = Path(run_dir) / "ray" / "nonce"
        deadline, problem = time.monotonic() + SEEN_SECONDS, None
        while (content := _content(seen)) != nonce:
            if time.monotonic() > deadline:
                what = f"does not see {run_dir}" if content is None else f"has another {run_dir} of its own"
                problem = f"{what}; the run's folder must be on a file system that all nodes share"
                break
            await asyncio.sleep(_POLL_SECONDS)
        if problem is None and not os.access(folder, os.X_OK):
            problem = f"has no folder {folder}; say where to work by launcher.options.folder"
        return {
            "host": hostname(),
            "address": util.get_node_ip_address(),
            "node": ray.get_runtime_context().get_node_id(),
            "version": __version__,
            "problem": problem,
        }

    async def free_port(self) -> int:
        """At which the first node's agent can listen."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
            return port

    async def run(
        self, command: Sequence[str], settings: Mapping[str, str], assigned_cpus: float, folder: str, log: str
    ) -> int:
        """Start the agent, with these variables beside this process's own, and wait for its end; its exit code."""
        variables = {name: value for name, value in environment().items() if name not in _OF_THE_WORKER}
        if variables.get("OMP_NUM_THREADS") == str(max(int(assigned_cpus), 1)):
            del variables["OMP_NUM_THREADS"]  # Ray's choice, by the CPUs of all ranks of this node
        variables |= settings
        with open(log, "ab") as output:
            self._agent = subprocess.Popen(
                [*command[:1], "-m", "unitrain.launchers._ray_agent", str(os.getpid()), *command[1:]],
                env=variables,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # rank 0's lines, which are in its log
                stderr=output,
                start_new_session=True,
            )
        while (code := self._agent.poll()) is None:
            await asyncio.sleep(_POLL_SECONDS)
        return code

    async def signal(self, number: int) -> None:
        """Signal the agent, if it runs."""
        if self._agent is not None and self._agent.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._agent.send_signal(number)


def _content(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
