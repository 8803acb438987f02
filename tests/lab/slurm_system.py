"""A Slurm of our own on this machine: several nodes, each with its own network, address and name; disks are shared."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from .machine import processes, turn

HERE = Path(__file__).parent
START_SECONDS = 400  # with the installation of the packages


class Cluster:
    """Nodes slurm1, slurm2, ... while entered; `environ` leads Slurm's commands there."""

    def __init__(self, *, nodes: int = 3, **settings: object) -> None:
        self.names = [f"slurm{number}" for number in range(1, nodes + 1)]
        self._settings = {"NODES": nodes, **settings}

    def __enter__(self) -> Cluster:
        if os.geteuid() != 0:
            pytest.skip("not run: only root can make network namespaces for a Slurm of several nodes")
        if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
            pytest.skip("not run: there is no slurmctld, and no apt-get to install it with")
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(turn("Slurm"))
            self.folder = Path(tempfile.mkdtemp(prefix="unitrain-slurm-"))  # short: sockets lie in it
            self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _up(self) -> None:
        settings = {name.upper(): str(value) for name, value in self._settings.items()}
        log = self.folder / "up.log"
        self._stack.callback(subprocess.run, [HERE / "slurm_down.sh", self.folder], timeout=120, check=True)
        with log.open("wb") as file:  # no pipe: the daemons would keep it open
            up = subprocess.run(
                [HERE / "slurm_up.sh", self.folder],
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                timeout=START_SECONDS,
                check=False,
            )
        if up.returncode:
            said = log.read_text(errors="replace")
            apt = self.folder / "log" / "apt.log"
            if apt.exists() and shutil.which("slurmctld") is None:
                pytest.skip(f"not run: Slurm could not be installed ({apt.read_text(errors='replace')[-300:]!r})")
            raise AssertionError(f"Slurm did not start:\n{said[-3000:]}")

    @property
    def environ(self) -> dict[str, str]:
        """What leads Slurm's commands to this cluster."""
        return {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def __call__(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env={**os.environ, **self.environ}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def facts(self, job_id: str) -> dict[str, str]:
        """All that the controller knows of a job; empty once it has forgotten it."""
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "--oneliner", "show", "job", job_id, check=False)))

    def wait_for(self, job_id: str, seconds: float = 90, **wanted: str) -> dict[str, str]:
        """The job's facts once they are as wanted, such as JobState="RUNNING", Restarts="1"."""
        deadline = time.monotonic() + seconds
        while True:
            facts = self.facts(job_id)
            if all(facts.get(name) == value for name, value in wanted.items()):
                return facts
            assert time.monotonic() < deadline, f"job {job_id} is not {wanted} after {seconds} s but {facts}"
            time.sleep(0.1)

    def lose(self, name: str) -> None:
        """Kill a node's slurmd and all that runs on the node, as a power failure does."""
        pids = [int(pid) for pid in self("ip", "netns", "pids", name).split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def boot(self, name: str) -> None:
        """Start a node again after `lose`, or after it was set down."""
        if not self("ip", "netns", "pids", name).split():
            enter = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts"]
            words = f"hostname {name} && exec slurmd -N {name}"
            subprocess.run([*enter, "bash", "-c", words], env={**os.environ, **self.environ}, check=True, timeout=30)
        self("scontrol", "update", f"nodename={name}", "state=resume", check=False)


class System:
    """For the tests that every launcher must pass."""

    nodes, nproc = 2, 1
    # Ranks that save and leave would be started again, and again.
    options: Mapping[str, Any] = {"requeue": False}
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

    def folder(self, here: Path) -> Path:
        return here  # the nodes see this machine's disk

    def left(self, run_dir: Path) -> list[str]:
        jobs = self._cluster("squeue", "--noheader", "--format=job %i %T").splitlines()
        return [*processes(run_dir), *(job for job in jobs if "COMPLETING" not in job)]
