"""Where the conformance jobs of each launcher run: the one place to plug a launcher's own system in.

A launcher whose system a test can start has `tests/lab/<launcher>_system.py` with a class `System` of the form below.
A launcher without that file is rendered and refused like all others, but starts nothing in these tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import pytest

from ..lab.machine import processes

LAB = Path(__file__).resolve().parents[1] / "lab"


def options_of(launcher: str, nodes: int) -> dict[str, Any]:
    """What the launcher asks for beside nodes and ranks, so that its jobs can be rendered anywhere."""
    asked: dict[str, dict[str, Any]] = {
        "torchrun": {"rdzv_endpoint": "node-1:29400"} if nodes > 1 else {},
        "ssh": {"hosts": [f"node-{number}" for number in range(nodes)]},
        "mpi": {"hosts": [f"node-{number}" for number in range(nodes)]},
        "kubernetes": {"image": "registry.local/unitrain:1", "volume": {"claim": "runs"}},
    }
    return asked.get(launcher, {})


class System(Protocol):
    """A system that is up while entered; entering skips the tests, with the reason, where it cannot be."""

    nodes: int  # of the jobs that are started on it
    nproc: int  # ranks on each; nodes * nproc is at least 2
    options: Mapping[str, Any]  # launcher.options of these jobs
    environ: Mapping[str, str]  # variables that whoever submits needs, and whoever asks later
    patience_seconds: float  # from a submission to the first line of a rank, on a busy machine
    detaches: bool  # its jobs can outlive whoever submits them
    process: bool  # a job's id is the number of the process that runs the rendered command

    def __enter__(self) -> System: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def folder(self, here: Path) -> Path:
        """A new folder for a test's runs that all nodes see under this path; `here` is only this machine's."""

    def left(self, run_dir: Path) -> list[str]:
        """What is left of a run's job on any node, each in a few words: processes, pods."""


class ThisMachine:
    """For launchers that need nothing but this machine."""

    nodes, nproc = 1, 2
    options: Mapping[str, Any] = {}
    environ: Mapping[str, str] = {}
    patience_seconds = 60.0
    process = True

    def __init__(self, *, detaches: bool) -> None:
        self.detaches = detaches

    def __enter__(self) -> ThisMachine:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def folder(self, here: Path) -> Path:
        return here

    def left(self, run_dir: Path) -> list[str]:
        return processes(run_dir)


WAYS = ("ray-private",)  # beside the one that goes by the launcher's own name: what follows the dash


def system_of(launcher: str) -> System:
    """The launcher's system, not entered yet. Skips where there is none."""
    if launcher == "ray-private":
        pytest.importorskip("ray", reason="not run: Ray is not installed")
    if launcher in ("local", "torchrun", "ray-private"):
        return ThisMachine(detaches=launcher != "torchrun")
    if not (LAB / f"{launcher}_system.py").exists():
        pytest.skip(f"not run: no test can start what {launcher} needs (there is no tests/lab/{launcher}_system.py)")
    found: System = importlib.import_module(f"...lab.{launcher}_system", __name__).System()
    return found
