"""What a RayJob of KubeRay is: a cluster of one head and a worker for each node, and our driver as its entrypoint."""

from __future__ import annotations

import shlex
from typing import Any

from unitrain.launchers._kubernetes_pod import (
    NODE_LABEL,
    RECIPE_FOLDER,
    Shape,
    literal,
    pod,
)
from unitrain.launchers._ray_options import DRIVER, FILE, Plan

SUBMITTER, HEAD, FIRST_WORKER = 0, 1, 2  # numbers of the pods, as people are told them
ROOM_SECONDS = 600.0  # for Ray to know of all workers; the entrypoint starts when their pods run


def plan_text(shape: Shape) -> str:
    """The content of ray.json: a bundle fills a worker."""
    wishes = shape.wishes
    plan = Plan(
        address=None,
        private=False,
        submission_id="",
        entrypoint="",
        bundle={"CPU": float(shape.nproc), **({"GPU": float(wishes.gpus)} if wishes.gpus else {})},
        placement="STRICT_SPREAD",
        python=wishes.python,
        folder=wishes.workdir or ".",
        environment=tuple(name for name in ("OMP_NUM_THREADS",) if name in wishes.env),
        threads=None,
        wait_seconds=ROOM_SECONDS,
        rejoin_seconds=shape.rejoin_seconds,
        ca_file=None,
    )
    return plan.text


def driver(shape: Shape) -> list[str]:
    """The command of the entrypoint."""
    return [
        *(shape.wishes.python, "-m", DRIVER, shape.run_dir),
        *("--files", RECIPE_FOLDER, "--job", shape.name),
    ]


def spec(shape: Shape) -> dict[str, Any]:
    """Of the RayJob, without what all kinds say alike."""
    wishes = shape.wishes
    gpus = {"num-gpus": str(wishes.gpus)} if wishes.gpus else {}
    workers = [
        {
            "groupName": f"node-{node}",
            "replicas": 1,
            "minReplicas": 1,
            "maxReplicas": 1,
            "rayStartParams": {"num-cpus": str(shape.nproc), **gpus},
            "template": _template(shape, FIRST_WORKER + node, "node"),
        }
        for node in range(shape.nodes)
    ]
    head = _template(shape, HEAD, "head")
    head["spec"]["containers"][0].pop("resources", None)  # it trains nothing
    return {
        "entrypoint": literal(shlex.join(driver(shape))),
        "submissionMode": "K8sJobMode",
        "backoffLimit": wishes.retries,  # a lost head takes its cluster along; the next one goes on
        "shutdownAfterJobFinishes": True,
        "rayClusterSpec": {
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
                "template": head,
            },
            "workerGroupSpecs": workers,
        },
        "submitterPodTemplate": _submitter(shape),
    }


def _template(shape: Shape, number: int, container: str) -> dict[str, Any]:
    """A pod in which KubeRay runs `ray start`."""
    body = pod(shape, node=str(number), meet="", container=container, index=None)
    box = body["containers"][0]
    del box["command"], box["ports"]
    # Ray's processes would end at once when the pod is asked to; this has the ranks save first.
    stop = [shape.wishes.python, "-m", DRIVER, shape.run_dir, "--stop", f"{shape.wishes.grace_seconds:g}"]
    box["lifecycle"] = {"preStop": {"exec": {"command": [literal(word) for word in stop]}}}
    return {"metadata": {"labels": shape.labels(**{NODE_LABEL: str(number)})}, "spec": body}


def _submitter(shape: Shape) -> dict[str, Any]:
    """The pod that hands the entrypoint to the head, and prints what it says."""
    body = pod(shape, node=str(SUBMITTER), meet="", container="submitter", index=None)
    box = body["containers"][0]
    for name in ("command", "ports", "resources", "volumeMounts", "env", "envFrom"):
        box.pop(name, None)
    body["volumes"] = []
    return {"metadata": {"labels": shape.labels(**{NODE_LABEL: str(SUBMITTER)})}, "spec": body}


FILES = {FILE: plan_text}
