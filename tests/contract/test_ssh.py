"""What ssh and mpirun are handed, against what was recorded: a difference is then a decision, not an accident."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from unitrain.launcher import Job, Launcher, Rendered
from unitrain.launchers.mpi import MPI
from unitrain.launchers.ssh import SSH

pytestmark = pytest.mark.fast

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "launchers"
RECORD = "UNITRAIN_RECORD"  # set it to 1 to write the recorded files anew, and look at the difference

JOB = {"run_id": "gpt-1", "run_dir": Path("/runs/gpt-1"), "preload": ("torch", "unitrain.trainer")}
THERE = {"python": "/opt/venv/bin/python", "folder": "/projects/gpt"}
ALL = {
    "hosts": ["node-1", "trainer@node-2:2222"],
    "ssh_config": "/projects/ssh config",
    "identity": "/projects/key",
    "environment": ["HF_TOKEN", "NCCL_*"],
    "address": "10.0.0.1",
    "port": 23456,
    "connect_seconds": 2.5,
    "silence_seconds": 60,
    "detached": True,
    "grace_seconds": 120,
    "min_nodes": 1,
    "join_seconds": 300,
    "rejoin_seconds": 600,
    **THERE,
}
CASES = {
    "ssh": Job(nodes=2, nproc=8, options={"hosts": ["node-1", "node-2"], **THERE}, **JOB),
    "ssh-one-host": Job(nodes=1, nproc=4, options={"hosts": ["me@[fd00::7]"], **THERE}, **JOB),
    "ssh-all-options": Job(nodes=2, nproc=8, options=ALL, **JOB),
    "mpi": Job(nodes=2, nproc=4, options={"hosts": ["node-1", "node-2"]}, **JOB),
    "mpi-here": Job(nodes=1, nproc=4, **JOB),
    "mpi-all-options": Job(
        nodes=2,
        nproc=4,
        options={
            "hosts": ["node-1", "node-2"],
            "mpirun": "/opt/openmpi/bin/mpirun",
            "python": "/opt/venv/bin/python",
            "ssh_config": "/projects/ssh_config",
            "identity": "/projects/key",
            "environment": ["HF_TOKEN", "PYTHONPATH"],
            "address": "10.0.0.1",
            "port": 23456,
            "mca": {"btl_tcp_if_include": "eth0", "pml": "ob1"},
            "allow_run_as_root": True,
            "grace_seconds": 120,
            "detached": True,
        },
        **JOB,
    ),
}


def as_text(rendered: Rendered) -> str:
    """Files, environment and command as one readable text, the same on every machine."""
    files = [f"--- {path}\n{content}" for path, content in rendered.files.items()]
    environ = [f"{name}={value}" for name, value in rendered.environ.items()]
    command = shlex.join(["python" if word == sys.executable else word for word in rendered.argv])
    return "\n".join(
        [*files, "--- command", *environ, command.replace(" --", " \\\n  --").replace(" -x", " \\\n  -x"), ""]
    )


@pytest.mark.parametrize("case", CASES)
def test_a_rendering_is_the_recorded_one(case: str) -> None:
    launcher: Launcher = SSH() if case.startswith("ssh") else MPI()
    text = as_text(launcher.render(CASES[case]))
    path = RECORDED / f"{case}.txt"
    if os.environ.get(RECORD):
        path.write_text(text)
    assert text == path.read_text(), f"if that is meant, record it with {RECORD}=1"
