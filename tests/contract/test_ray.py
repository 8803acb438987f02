"""What is handed to Ray, against what was recorded: a difference is then a decision, not an accident."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from unitrain.launcher import Job, Rendered
from unitrain.launchers.ray import Ray

pytestmark = pytest.mark.fast

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "launchers"
RECORD = "UNITRAIN_RECORD"  # set it to 1 to write the recorded files anew, and look at the difference

JOB = {"run_id": "gpt-1", "run_dir": Path("/runs/gpt-1"), "preload": ("torch", "unitrain.trainer")}
HEAD = {"address": "http://head:8265/", "folder": "/projects/my work", "python": "/opt/venv/bin/python"}
CASES = {
    "ray": Job(nodes=1, nproc=2, options={"folder": "/work"}, **JOB),
    "ray-private-nodes": Job(nodes=2, nproc=2, options={"folder": "/work", "detached": True, "min_nodes": 1}, **JOB),
    "ray-cluster": Job(nodes=2, nproc=4, options=HEAD, **JOB),
    "ray-cluster-full": Job(
        nodes=4,
        nproc=8,
        options={
            **HEAD,
            "address": "https://ray.example.org",
            "ca_file": "/etc/ssl/ray.pem",
            "placement": "STRICT_SPREAD",
            "cpus_per_rank": 4,
            "gpus_per_rank": 1,
            "resources": {"rack-a": 0.01},
            "wait_seconds": 3600,
            "environment": ["HF_HOME", "NCCL_*"],
            "min_nodes": 2,
            "rejoin_seconds": 600,
            "grace_seconds": 90,
        },
        **JOB,
    ),
}


def as_text(rendered: Rendered) -> str:
    """The files and the command line, the same on every machine."""
    files = [f"--- {path}\n{content}" for path, content in rendered.files.items()]
    environ = [f"{name}={value}" for name, value in rendered.environ.items()]
    text = "\n".join([*files, "--- command", *environ, shlex.join(rendered.argv), ""])
    return text.replace(sys.executable, "python")


@pytest.mark.parametrize("case", CASES)
def test_a_rendering_is_the_recorded_one(case: str) -> None:
    text = as_text(Ray().render(CASES[case]))
    path = RECORDED / f"{case}.txt"
    if os.environ.get(RECORD):
        path.write_text(text)
    assert text == path.read_text(), f"if that is meant, record it with {RECORD}=1"
