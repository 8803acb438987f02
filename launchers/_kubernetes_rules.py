"""What no schema says of a run's objects: that they fit each other. Asked of what is about to be sent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unitrain.launchers._kubernetes_pod import LONGEST_NAME, RECIPE_FOLDER

MOST_BYTES = 1_000_000  # of a ConfigMap; the server takes 1 MiB with all that stands around it
SHELLS = {"sh", "bash", "dash", "zsh", "ash"}

Object = Mapping[str, Any]


def broken(objects: Sequence[Object], *, grace_seconds: float, nproc: int) -> list[str]:
    """A sentence for each rule that the objects break."""
    return [sentence for rule in (_names, _config_map, _services, _pods) for sentence in rule(objects)] + list(
        _budgets(objects, grace_seconds, nproc)
    )


def pod_templates(objects: Sequence[Object]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Labels and spec of every pod that the objects describe, however deep."""

    def walk(value: Any) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        if isinstance(value, Mapping):
            if "containers" in value and isinstance(value["containers"], list):
                return
            spec = value.get("spec")
            if isinstance(spec, Mapping) and "containers" in spec:
                yield value.get("metadata", {}).get("labels", {}), spec
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, list):
            for item in value:
                yield from walk(item)

    for each in objects:
        yield from walk(each)


def _names(objects: Sequence[Object]) -> Iterator[str]:
    for each in objects:
        name = each["metadata"]["name"]
        # JobPerNode's have the node's number behind the name
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > LONGEST_NAME + 8:
            yield f"{each['kind']} cannot be named {name!r}: RFC 1035 has few lowercase letters, digits and '-'"
        for key, value in each["metadata"].get("labels", {}).items():
            if len(value) > 63:
                yield f"the value of label {key} has {len(value)} letters, and 63 is the limit"


def _config_map(objects: Sequence[Object]) -> Iterator[str]:
    made = {each["metadata"]["name"] for each in objects if each["kind"] == "ConfigMap"}
    for each in objects:
        if each["kind"] == "ConfigMap":
            size = sum(len(text.encode()) for text in each["data"].values())
            if size > MOST_BYTES:
                yield f"the recipe has {size} bytes with the job, and a ConfigMap takes {MOST_BYTES}; shorten it"
    for _, spec in pod_templates(objects):
        for volume in spec["volumes"]:
            if volume["name"] == "recipe" and volume["configMap"]["name"] not in made:
                yield f"pods mount ConfigMap {volume['configMap']['name']!r}, which is not among the objects"


def _services(objects: Sequence[Object]) -> Iterator[str]:
    services = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "Service"}
    pods = list(pod_templates(objects))
    for name, spec in services.items():
        for labels, pod in pods:
            if not spec["selector"].items() <= labels.items():
                yield f"service {name!r} selects {spec['selector']}, and pods have {dict(labels)}"
            if pod.get("subdomain") != name:
                yield f"service {name!r} gives no names to pods of subdomain {pod.get('subdomain')!r}"
            ports = {port["containerPort"] for box in pod["containers"] for port in box.get("ports", [])}
            if not {port["port"] for port in spec["ports"]} <= ports:
                yield f"service {name!r} has other ports than its pods: {sorted(ports)}"
    for _, pod in pods:
        if "subdomain" in pod and pod["subdomain"] not in services:
            yield f"pods have subdomain {pod['subdomain']!r}, and there is no service of that name"


def _pods(objects: Sequence[Object]) -> Iterator[str]:
    for _, spec in pod_templates(objects):
        known = {volume["name"] for volume in spec["volumes"]}
        for box in spec["containers"]:
            mounts = box.get("volumeMounts", [])
            if lost := {mount["name"] for mount in mounts} - known:
                yield f"container {box['name']!r} mounts {', '.join(sorted(lost))}, which the pod has not"
            paths = [mount["mountPath"] for mount in mounts]
            if twice := {path for path in paths if paths.count(path) > 1}:
                yield f"container {box['name']!r} mounts two volumes at {', '.join(sorted(twice))}"
            words = box.get("command")
            if words is None:
                continue  # a TrainJob's stands elsewhere
            if words[0].rpartition("/")[2] in SHELLS:
                yield f"container {box['name']!r} runs a shell, which keeps SIGTERM from the agent"
            if RECIPE_FOLDER in words and RECIPE_FOLDER not in paths:
                yield f"container {box['name']!r} reads {RECIPE_FOLDER}, and mounts nothing there"
            yield from _meeting(box, words)


def _meeting(box: Mapping[str, Any], words: Sequence[str]) -> Iterator[str]:
    """The port at which nodes meet is one that the container names."""
    if "--meet" in words:
        port = words[words.index("--meet") + 1].rpartition(":")[2]
        if port not in {str(known["containerPort"]) for known in box.get("ports", [])}:
            yield f"nodes meet at port {port}, which container {box['name']!r} does not name"


def _budgets(objects: Sequence[Object], grace_seconds: float, nproc: int) -> Iterator[str]:
    """Times that lie inside each other, and a GPU for each rank."""
    for _, spec in pod_templates(objects):
        pod_seconds = spec.get("terminationGracePeriodSeconds", 30)
        if not grace_seconds < pod_seconds:
            yield f"a pod is killed {pod_seconds} s after SIGTERM, and its ranks may take {grace_seconds:g} s to save"
        for box in spec["containers"]:
            limits = box.get("resources", {}).get("limits", {})
            for name, count in limits.items():
                if name not in ("memory", "cpu") and int(count) != nproc:
                    yield f"{nproc} ranks cannot have one each of {count} {name}"
    for each in objects:
        spec = each.get("spec", {})
        queued = "kueue.x-k8s.io/queue-name" in each["metadata"].get("labels", {})
        suspended = bool(spec.get("suspend", spec.get("runPolicy", {}).get("suspend", False)))
        if queued != suspended:
            yield f"{each['kind']} {each['metadata']['name']!r} has a queue or is suspended, and needs both or neither"
        if spec.get("completionMode") == "Indexed" and spec["completions"] != spec["parallelism"]:
            yield f"{spec['parallelism']} of {spec['completions']} nodes would run, and wait for the others"
