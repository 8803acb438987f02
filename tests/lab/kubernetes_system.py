"""A Kubernetes 1.20 of our own on this machine: real servers, one kubelet, pods that run this machine's Python."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from .machine import processes, turn

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAB = Path(os.environ.get("UNITRAIN_LAB_K8S", "/var/lib/unitrain-k8s"))
START_SECONDS = 400  # with the installation of the packages
CANNOT = 77


class Lab:
    """The servers while entered: `parts` of api, node and crds."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts

    def __enter__(self) -> Lab:
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(turn("Kubernetes"))
            self._stack.callback(_script, "k8s_down.sh", "--purge")
            up = _script("k8s_up.sh", *self.parts)
            said = up.stdout.strip().splitlines()
            if up.returncode == CANNOT:
                pytest.skip(f"not run: {said[-1]}")
            assert up.returncode == 0, f"Kubernetes did not start:\n{up.stdout[-3000:]}"
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def ask(self, method: str, path: str, body: Any = None, *, server: str = "https://127.0.0.1:16443") -> Any:
        """What a server answers to its administrator, as JSON; its status is in `code` where it refuses."""
        pki = LAB / "pki"
        command = ["curl", "-s", "--cacert", pki / "ca.crt", "--cert", pki / "admin.crt", "--key", pki / "admin.key"]
        command += ["-X", method, "-H", "Content-Type: application/json", f"{server}{path}"]
        if body is not None:
            command += ["--data-binary", "@-"]
        text = None if body is None else json.dumps(body)
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=True)
        try:
            return json.loads(done.stdout)
        except json.JSONDecodeError:  # of a resource that the server has not come to yet
            return {"kind": "Status", "message": done.stdout}

    def pods(self, namespace: str = "default") -> list[dict[str, Any]]:
        """Those that are there, oldest first."""
        found: list[dict[str, Any]] = self.ask("GET", f"/api/v1/namespaces/{namespace}/pods")["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    @property
    def options(self) -> dict[str, Any]:
        """launcher.options by which pods run this machine's Python with this checkout."""
        seen = dict.fromkeys(Path(path).resolve() for path in ("/usr", sys.base_prefix, sys.prefix, ROOT))
        folders = [path for path in seen if not any(path != other and path.is_relative_to(other) for other in seen)]
        return {
            "kubeconfig": str(LAB / "kubeconfig"),
            "image": "localhost/host:1",
            "image_pull_policy": "Never",
            "meet": "shared",  # there is no DNS
            "python": sys.executable,
            "volume": {"host_path": str(LAB / "runs")},
            "mounts": [{"host_path": str(path), "path": str(path), "read_only": True} for path in folders],
            "env": {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": 1, "OMP_NUM_THREADS": 1, "HOME": "/tmp"},
            "workdir": "/tmp",
        }

    def folder(self) -> Path:
        """A new one that pods see under the same path."""
        (LAB / "runs").mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(dir=LAB / "runs", prefix="t-"))


def _script(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as file:  # no pipe: the servers would keep it open
        done = subprocess.run(
            [HERE / name, *words],
            env={**os.environ, "UNITRAIN_LAB_K8S": str(LAB)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            timeout=START_SECONDS,
            check=False,
        )
        file.seek(0)
        return subprocess.CompletedProcess(done.args, done.returncode, file.read())


class System:
    """For the tests that every launcher must pass."""

    nodes, nproc = 2, 1
    patience_seconds = 120.0
    detaches, process = True, False
    environ: Mapping[str, str] = {}

    def __init__(self) -> None:
        self._lab = Lab("api", "node")

    @property
    def options(self) -> Mapping[str, Any]:
        # Ranks that save and leave would be started again, and again.
        return {**self._lab.options, "kind": "jobs", "retries": 0}

    def __enter__(self) -> System:
        self._lab.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._lab.__exit__(*error)

    def folder(self, here: Path) -> Path:
        return self._lab.folder()

    def left(self, run_dir: Path) -> list[str]:
        phases = ((pod["metadata"]["name"], pod["status"]["phase"]) for pod in self._lab.pods())
        return [*processes(run_dir), *(f"{name} {phase}" for name, phase in phases if phase in ("Pending", "Running"))]
