"""The manifests of every kind: as recorded, and by the schemas of Kubernetes' versions, unknown fields forbidden."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from unitrain.launcher import Job
from unitrain.launchers._kubernetes_kinds import KINDS
from unitrain.launchers._kubernetes_pod import LATEST
from unitrain.launchers._kubernetes_yaml import from_text
from unitrain.launchers.kubernetes import MANIFEST, Kubernetes

pytestmark = pytest.mark.fast

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "launchers"
RECORD = "UNITRAIN_RECORD"  # as for the other launchers

JOB = {
    "run_id": "gpt-1",
    "run_dir": Path("/nowhere/gpt-1"),
    "recipe": "name: gpt\ntrainer: unitrain.tasks:LanguageModel\n",
    "preload": ("torch", "unitrain.trainer"),
}
PLAIN = {"image": "registry.example.org/team/unitrain:1", "volume": {"claim": "runs"}}
FULL = {
    **PLAIN,
    "namespace": "team-a",
    "python": "/opt/venv/bin/python",
    "workdir": "/work",
    "image_pull_policy": "IfNotPresent",
    "image_pull_secrets": ["registry"],
    "mounts": [{"claim": "data", "path": "/data", "read_only": True}, {"secret": "netrc", "path": "/etc/netrc.d"}],
    "env": {"NCCL_SOCKET_IFNAME": "eth0", "HF_TOKEN": {"secret": "hf", "key": "token"}},
    "env_from": ["object-store"],
    "gpus": 8,
    "cpu": 32,
    "memory": "256Gi",
    "shm": "64Gi",
    "node_selector": {"pool": "a100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "service_account": "trainer",
    "priority_class": "high",
    "run_as": 1000,
    "labels": {"team": "a"},
    "annotations": {"contact": "team-a@example.org"},
    "queue": "team-a",
    "retries": 5,
    "grace_seconds": 90,
    "deadline_seconds": 86400,
}
NOT_OF_TRAINJOB = {"env_from", "priority_class", "image_pull_policy", "workdir"}
CASES = {
    **{f"kubernetes-{kind}": Job(nodes=2, nproc=4, options=PLAIN | {"kind": kind}, **JOB) for kind in KINDS},
    "kubernetes-one-node": Job(nodes=1, nproc=1, options=PLAIN, **JOB),
    "kubernetes-job-full": Job(nodes=4, nproc=8, options=FULL | {"kind": "job"}, **JOB),
    "kubernetes-trainjob-full": Job(
        nodes=4,
        nproc=8,
        options={key: value for key, value in FULL.items() if key not in NOT_OF_TRAINJOB} | {"kind": "trainjob"},
        **JOB,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rendering_is_the_recorded_one(case: str) -> None:
    rendered = Kubernetes().render(CASES[case])
    files = [f"--- {path}\n{content}" for path, content in rendered.files.items()]
    text = "\n".join([*files, "--- command of each pod", shlex.join(rendered.argv).replace(" --", " \\\n  --"), ""])
    path = RECORDED / f"{case}.txt"
    if os.environ.get(RECORD):
        path.write_text(text)
    assert text == path.read_text(), f"if that is meant, record it with {RECORD}=1"


def core_objects(kind: str, minor: int) -> list[dict[str, Any]]:
    """Those objects of a full job whose kinds belong to Kubernetes itself, as they are sent to a server 1.`minor`."""
    options = FULL | {"kind": kind}
    rendered = Kubernetes().for_server(Job(nodes=4, nproc=8, options=options, **JOB), KINDS[kind], minor)
    return [each for each in from_text(rendered.files[MANIFEST]) if each["apiVersion"] in ("v1", "batch/v1")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("minor", [25, 28, 31, 34, 37])
def test_a_server_of_every_version_knows_every_field(kind: str, minor: int) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="not run: kubernetes-validate is not installed")
    for each in core_objects(kind, minor):
        schemas.validate(each, f"1.{minor}", strict=True)


@pytest.mark.parametrize("minor", [25, 37])
def test_a_field_that_does_not_exist_is_found(minor: int) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="not run: kubernetes-validate is not installed")
    (job,) = [each for each in core_objects("job", LATEST) if each["kind"] == "Job"]
    job["spec"]["backofLimit"] = 3
    with pytest.raises(schemas.ValidationError):
        schemas.validate(job, f"1.{minor}", strict=True)


def test_an_older_server_is_not_sent_what_it_does_not_know() -> None:
    (old,) = [each for each in core_objects("job", 24) if each["kind"] == "Job"]
    (new,) = [each for each in core_objects("job", LATEST) if each["kind"] == "Job"]
    assert new["spec"].keys() - old["spec"].keys() == {"podFailurePolicy", "podReplacementPolicy"}
