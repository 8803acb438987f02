"""What one pod of a run is: the command, the folders that it sees, and what it may use."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from unitrain.agent.job import AgentJob
from unitrain.errors import ExitCode, UserError
from unitrain.launchers._kubernetes_options import Wishes, volume_path

LONGEST_NAME = 40  # pods, their hosts and child objects append theirs, and 63 letters is the limit of a host's name
RECIPE_FOLDER = "/etc/unitrain"
JOB_LABEL = "unitrain.dev/job"
NODE_LABEL = "unitrain.dev/node"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
FINAL_CODES = (int(ExitCode.BAD_RECIPE), int(ExitCode.CRASH_LOOP))  # another pod would end in the same way
_UNIQUE = re.compile(r".*-[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")  # as `run.new_id` makes them
LATEST = 99  # a minor version that no server has: nothing is left out


@dataclass(frozen=True, kw_only=True)
class Shape:
    """All that objects are made of."""

    run_id: str
    name: str  # of the objects
    nodes: int
    nproc: int
    run_dir: str  # as pods see it
    wishes: Wishes
    files: Mapping[str, str] = field(default_factory=dict)  # that go into the run's folder
    minor: int = LATEST  # version 1.x of the server
    rejoin_seconds: float = AgentJob.rejoin_seconds

    def metadata(self, name: str | None = None, **labels: str) -> dict[str, Any]:
        """Of an object of this run."""
        found: dict[str, Any] = {"name": name or self.name}
        if self.wishes.namespace:
            found["namespace"] = self.wishes.namespace
        found["labels"] = self.labels(**labels)
        found["annotations"] = {**_texts(self.wishes.annotations), "unitrain.dev/run": self.run_id}
        return found

    def labels(self, **more: str) -> dict[str, str]:
        """By which the run's objects and pods are found."""
        ours = {"app.kubernetes.io/managed-by": "unitrain", JOB_LABEL: self.name}
        return {**self.wishes.labels, **ours, **more}


def object_name(run_dir: Path, number: int) -> str:
    """A name for the objects of a run's submission (from 0) by the rules of RFC 1035.

    A run whose id is not one of ours, or has to be changed for that, gets a mark of its folder: other runs of the
    namespace may have the same id.
    """
    ending = f"-r{number}" if number else ""
    plain = re.sub(r"[^a-z0-9]+", "-", run_dir.name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")
    if not _UNIQUE.fullmatch(plain) or plain != run_dir.name or len(plain + ending) > LONGEST_NAME:
        mark = hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:6]
        plain = f"{plain[: LONGEST_NAME - len(ending) - 7].rstrip('-')}-{mark}"
    return plain + ending


def folder_here(wishes: Wishes) -> Path | None:
    """Where this machine sees the folder of runs, if it does."""
    volume = wishes.volume or {}
    return Path(volume["here"]) if "here" in volume else Path(volume["host_path"]) if "host_path" in volume else None


def folder_in_pod(run_dir: Path, wishes: Wishes) -> str:
    """Where pods see a run's folder: at the same place in the volume where this machine sees it too."""
    path = PurePosixPath(volume_path(wishes.volume) if wishes.volume else "/runs")
    here = folder_here(wishes)
    inside = here is not None and run_dir.is_relative_to(here)
    found = str(path / (run_dir.relative_to(here) if here is not None and inside else run_dir.name))
    if not found.isprintable() or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_dir.name):
        raise UserError(
            f"the run's folder {str(run_dir)!r} cannot be one in a pod; give a --run-dir whose name has letters, "
            "digits, '.', '_' and '-' alone"
        )
    return found


def sees_folder(run_dir: Path, wishes: Wishes) -> bool:
    """True when this machine and the pods see the same folder of the run."""
    here = folder_here(wishes)
    return here is not None and Path(os.path.abspath(run_dir)).is_relative_to(here)


def command(shape: Shape, node: str, meet: str) -> list[str]:
    """What a container runs, as PID 1: no shell stands between it and SIGTERM."""
    wishes = shape.wishes
    words = [wishes.python, "-m", "unitrain.agent.unpack", RECIPE_FOLDER, shape.run_dir, "--job", shape.name]
    host = "shared" if wishes.meet == "shared" else meet
    return [*map(literal, words), "--node", node, *(["--meet", f"{host}:{wishes.port}"] if shape.nodes > 1 else [])]


def pod(shape: Shape, *, node: str, meet: str, container: str = "node", index: str | None = INDEX) -> dict[str, Any]:
    """A pod's spec. `node` is its number as an argument, and `index` the field from which $(NODE) comes."""
    wishes = shape.wishes
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": wishes.pod_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **placing(wishes),
        "containers": [
            {
                "name": container,
                "image": wishes.image,
                **({"imagePullPolicy": wishes.image_pull_policy} if wishes.image_pull_policy else {}),
                "command": command(shape, node, meet),
                **({"workingDir": wishes.workdir} if wishes.workdir else {}),
                **({"env": variables} if (variables := environment(shape, index)) else {}),
                **({"envFrom": [{"secretRef": {"name": name}} for name in wishes.env_from]} if wishes.env_from else {}),
                "ports": [{"name": "agents", "containerPort": wishes.port}],
                **({"resources": asked} if (asked := resources(wishes)) else {}),
                "volumeMounts": mounts(wishes),
                # The last words of the log are the first failing rank's own error.
                "terminationMessagePolicy": "FallbackToLogsOnError",
                **confined(wishes),
            }
        ],
        "volumes": volumes(shape),
    }
    if wishes.run_as:
        spec["securityContext"] = pod_security(wishes)
    return spec


def environment(shape: Shape, index: str | None) -> list[dict[str, Any]]:
    """Variables of the container: the user's, secrets by reference, and the pod's own place."""
    found: list[dict[str, Any]] = []
    if index is not None:
        found.append({"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": index}}})
    for name, value in shape.wishes.env.items():
        if isinstance(value, Mapping):
            found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": value["secret"], "key": value["key"]}}})
        else:
            found.append({"name": name, "value": literal(_text(value))})
    return found


def resources(wishes: Wishes) -> dict[str, Any]:
    """What a pod asks for, and what it may have at most. Cores have no limit: the kernel would hold ranks back."""
    requests: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    if wishes.cpu is not None:
        requests["cpu"] = str(wishes.cpu)
    if wishes.memory is not None:
        requests["memory"] = limits["memory"] = str(wishes.memory)
    if wishes.gpus:
        limits[wishes.gpu_resource] = str(wishes.gpus)
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def volumes(shape: Shape) -> list[dict[str, Any]]:
    """The recipe, shared memory, the folder of runs, and the user's."""
    wishes = shape.wishes
    memory: dict[str, Any] = {"medium": "Memory"}
    if wishes.shm is not None:
        memory["sizeLimit"] = str(wishes.shm)
    found: list[dict[str, Any]] = [
        {"name": "recipe", "configMap": {"name": shape.name}},
        {"name": "shm", "emptyDir": memory},
        {"name": "runs", **_source(wishes.volume or {"empty": "Disk"})},
    ]
    return [*found, *({"name": f"mount-{i}", **_source(mount)} for i, mount in enumerate(wishes.mounts))]


def mounts(wishes: Wishes) -> list[dict[str, Any]]:
    """Where the container sees the volumes."""
    runs = {"name": "runs", "mountPath": volume_path(wishes.volume) if wishes.volume else "/runs"}
    if wishes.volume and "sub_path" in wishes.volume:
        runs["subPath"] = wishes.volume["sub_path"]
    found: list[dict[str, Any]] = [
        {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        runs,
    ]
    for number, mount in enumerate(wishes.mounts):
        more: dict[str, Any] = {"name": f"mount-{number}", "mountPath": mount["path"]}
        if "sub_path" in mount:
            more["subPath"] = mount["sub_path"]
        if mount.get("read_only", "secret" in mount or "config_map" in mount):
            more["readOnly"] = True
        found.append(more)
    return found


def placing(wishes: Wishes) -> dict[str, Any]:
    """On which machines, and with whose rights."""
    found: dict[str, Any] = {}
    if wishes.service_account:
        found["serviceAccountName"] = wishes.service_account
    if wishes.priority_class:
        found["priorityClassName"] = wishes.priority_class
    if wishes.image_pull_secrets:
        found["imagePullSecrets"] = [{"name": name} for name in wishes.image_pull_secrets]
    if wishes.node_selector:
        found["nodeSelector"] = dict(wishes.node_selector)
    if wishes.tolerations:
        found["tolerations"] = [dict(toleration) for toleration in wishes.tolerations]
    return found


def pod_security(wishes: Wishes) -> dict[str, Any]:
    """Of a pod whose processes belong to a given user."""
    return {
        "runAsUser": wishes.run_as,
        "runAsGroup": wishes.run_as,
        "runAsNonRoot": True,
        "fsGroup": wishes.run_as,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def confined(wishes: Wishes) -> dict[str, Any]:
    """What its container may not do."""
    found: dict[str, Any] = {"allowPrivilegeEscalation": False}
    if wishes.run_as:
        found["capabilities"] = {"drop": ["ALL"]}
    return {"securityContext": found}


def failure_policy(shape: Shape) -> dict[str, Any]:
    """What a Job does about pods that fail, as far as the server knows how.

    The first rule that fits counts. A pod that was stopped and has saved costs nothing, nor does an eviction.
    """
    found: dict[str, Any] = {}
    if shape.minor >= 25:
        rules = [_by_exit_code("FailJob", *FINAL_CODES)]
        if shape.wishes.retries:
            evicted = {"type": "DisruptionTarget", "status": "True"}
            rules += [
                _by_exit_code("Ignore", ExitCode.PREEMPTED),
                {"action": "Ignore", "onPodConditions": [evicted]},
            ]
        found["podFailurePolicy"] = {"rules": rules}
    if shape.minor >= 28:
        found["podReplacementPolicy"] = "Failed"  # never two pods of one node at once
    return found


def config_map(shape: Shape) -> dict[str, Any]:
    """The recipe and the job, from where node 0 copies them into the run's folder."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": shape.metadata(), "data": dict(shape.files)}


def service(shape: Shape) -> dict[str, Any]:
    """Names for the pods, also before they are ready: that is when they look for each other."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": shape.metadata(),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_LABEL: shape.name},
            "ports": [{"name": "agents", "port": shape.wishes.port}],
        },
    }


def _by_exit_code(action: str, *codes: int) -> dict[str, Any]:
    # The schemas of 1.25 to 1.28 want both keys, and servers want one of them empty.
    values = [int(code) for code in codes]
    return {"action": action, "onExitCodes": {"operator": "In", "values": values}, "onPodConditions": []}


def _source(volume: Mapping[str, Any]) -> dict[str, Any]:
    match volume:
        case {"claim": name}:
            return {"persistentVolumeClaim": {"claimName": name}}
        case {"host_path": path}:
            return {"hostPath": {"path": path}}
        case {"secret": name}:
            return {"secret": {"secretName": name}}
        case {"config_map": name}:
            return {"configMap": {"name": name}}
        case {"empty": "Memory"}:
            return {"emptyDir": {"medium": "Memory"}}
    return {"emptyDir": {}}


def literal(word: str) -> str:
    """The word with no $(NAME) in it that Kubernetes would replace."""
    return word.replace("$(", "$$(")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: _text(value) for key, value in values.items()}
