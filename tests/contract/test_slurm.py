"""What is handed to Slurm, against what was recorded: a difference is then a decision, not an accident."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from unitrain.launcher import Job, Rendered
from unitrain.launchers.slurm import SCRIPT, Slurm

pytestmark = pytest.mark.fast

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "launchers"
RECORD = "UNITRAIN_RECORD"  # set it to 1 to write the recorded files anew, and look at the difference

JOB = {"run_id": "gpt-1", "run_dir": Path("/runs/gpt-1"), "preload": ("torch", "unitrain.trainer")}
SITE = {
    "partition": "gpu",
    "account": "proj",
    "qos": "high",
    "time": "12:00:00",
    "gpus_per_node": "a100:8",
    "cpus_per_task": 64,
    "mem": 0,
    "constraint": "ib",
    "mail_type": "END,FAIL",
    "mail_user": "me@example.org",
    "dependency": "afterok:1234",
    "comment": "the second try",
    "directives": ["--licenses=fluent:2", "--contiguous"],
    "warn_seconds": 300,
    "setup": "env.sh",
    "join_seconds": 900,
}
APPTAINER = {"gpus_per_node": 8, "container_image": "/images/torch.sif", "container_mounts": ["/data"]}
PYXIS = {"gpus_per_node": 8, "container_image": "registry.local/unitrain:1", "container_mounts": ["/a:/b"]}
CASES = {
    "slurm": Job(nodes=2, nproc=4, **JOB),
    "slurm-one-node": Job(nodes=1, nproc=8, options={"exclusive": True, "requeue": False}, **JOB),
    "slurm-site": Job(nodes=4, nproc=8, options=SITE, **JOB),
    "slurm-elastic": Job(nodes=4, nproc=8, options={"gres": "gpu:8", "min_nodes": 2, "rejoin_seconds": 30}, **JOB),
    "slurm-apptainer": Job(nodes=2, nproc=8, options=APPTAINER, **JOB),
    "slurm-pyxis": Job(nodes=2, nproc=8, options=PYXIS, **JOB),
}


def as_text(rendered: Rendered) -> str:
    """The files and the command line, the same on every machine."""
    files = [f"--- {path}\n{content}" for path, content in rendered.files.items()]
    text = "\n".join([*files, "--- command", shlex.join(rendered.argv), ""])
    return text.replace(shlex.quote(sys.executable), "python")


@pytest.mark.parametrize("case", [*CASES, "slurm-array"])
def test_a_rendering_is_the_recorded_one(case: str) -> None:
    if case == "slurm-array":
        jobs = [Job(run_id=f"gpt-{n}", run_dir=Path(f"/runs/gpt-{n}"), nodes=1, nproc=2) for n in range(3)]
        text = as_text(Slurm().render_array(jobs, Path("/runs/gpt")))
    else:
        text = as_text(Slurm().render(CASES[case]))
    if case != "slurm":  # the part that all scripts share is recorded once
        shared = Slurm().render(CASES["slurm"]).files[SCRIPT].partition("\n# From here on")[2]
        assert shared in text
        text = text.replace(shared, " ...\n")
    path = RECORDED / f"{case}.txt"
    if os.environ.get(RECORD):
        path.write_text(text)
    assert text == path.read_text(), f"if that is meant, record it with {RECORD}=1"
