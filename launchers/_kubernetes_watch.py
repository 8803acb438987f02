"""What becomes of a run's pods, and why they wait: from the objects that a cluster shows to sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from unitrain.launchers._kubernetes_pod import JOB_LABEL, NODE_LABEL

Object = Mapping[str, Any]

INDEX = "batch.kubernetes.io/job-completion-index"
_IMAGE = {"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError"}
_CONTAINER = {"CreateContainerConfigError", "CreateContainerError"}
_DONE = {"Complete", "Completed", "Succeeded"}


class Trouble(NamedTuple):
    """Why pods do not start."""

    text: str
    mends: bool  # waiting may mend it


class Ended(NamedTuple):
    """How the objects of a run have ended."""

    done: bool
    detail: str


def node_of(pod: Object) -> int:
    """The number of a pod's node."""
    meta = pod["metadata"]
    known = {**meta.get("labels", {}), **meta.get("annotations", {})}
    if "training.kubeflow.org/replica-index" in known:
        worker = known.get("training.kubeflow.org/replica-type") == "worker"
        return int(known["training.kubeflow.org/replica-index"]) + worker
    return int(known.get(NODE_LABEL, known.get(INDEX, 0)))


def newest(pods: Iterable[Object]) -> dict[int, Object]:
    """The newest pod of each node."""
    found: dict[int, Object] = {}
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", ""))):
        found[node_of(pod)] = pod
    return dict(sorted(found.items()))


def ended(jobs: Sequence[Object]) -> Ended | None:
    """How the objects that run pods have ended: one that has failed ends all, since their pods wait for each other."""
    conditions = [_conditions(job) for job in jobs]
    for met in conditions:
        if "Failed" in met:
            return Ended(False, _words(met["Failed"]))
    return Ended(True, "") if jobs and all(_DONE & met.keys() for met in conditions) else None


def waiting(jobs: Sequence[Object], pods: Iterable[Object], events: Iterable[Object]) -> list[Trouble]:
    """One sentence for each reason why something does not start, with all nodes that it keeps."""
    found: dict[Trouble, list[int]] = {}
    here = newest(pods)
    warnings = [event for event in events if event.get("type") == "Warning"]
    for node, pod in here.items():
        if (trouble := _pod_trouble(pod, warnings)) is not None:
            found.setdefault(trouble, []).append(node)
    texts = [Trouble(f"{_nodes(nodes)} {trouble.text}", trouble.mends) for trouble, nodes in found.items()]
    refused = {trouble: None for job in jobs if (trouble := _job_trouble(job, here, warnings)) is not None}
    return [*texts, *refused]


def phases(pods: Iterable[Object]) -> str:
    """`2 pods running`, `1 pod running, 1 pending`."""
    counts: dict[str, int] = {}
    for pod in newest(pods).values():
        leaving = "deletionTimestamp" in pod["metadata"]
        word = "ending" if leaving else str(pod.get("status", {}).get("phase", "unknown")).lower()
        counts[word] = counts.get(word, 0) + 1
    words = [f"{count} {word}" for word, count in sorted(counts.items())]
    return f"pods: {', '.join(words)}" if words else "no pods yet"


def cannot_start(pod: Object) -> bool:
    """True for a pod whose containers wait for what does not come; a kubelet may be slow to clear it away."""
    boxes = pod.get("status", {}).get("containerStatuses", [])
    reasons = {box.get("state", {}).get("waiting", {}).get("reason") for box in boxes}
    return bool(reasons) and reasons <= {*_IMAGE, *_CONTAINER}


def exit_code(pod: Object) -> int | None:
    """Of the pod's container, if it has ended."""
    for status in pod.get("status", {}).get("containerStatuses", []):
        for state in (status.get("state", {}), status.get("lastState", {})):
            if "terminated" in state:
                return int(state["terminated"]["exitCode"])
    return None


def last_words(pod: Object) -> str:
    """The last line that a failed container left, or why it was killed."""
    for status in pod.get("status", {}).get("containerStatuses", []):
        over = status.get("state", {}).get("terminated") or status.get("lastState", {}).get("terminated")
        if not over or over["exitCode"] == 0:
            continue
        if over.get("reason") == "OOMKilled":
            return f"node {node_of(pod)} used more memory than its limit; give launcher.options.memory more"
        if lines := str(over.get("message", "")).strip().splitlines():
            return lines[-1]
    status = pod.get("status", {})
    if status.get("reason") == "Evicted":
        return f"node {node_of(pod)} was evicted: {status.get('message', '')}"
    return ""


def _pod_trouble(pod: Object, warnings: Sequence[Object]) -> Trouble | None:
    status = pod.get("status", {})
    if status.get("phase") != "Pending" or "deletionTimestamp" in pod["metadata"]:
        return _crash_loop(pod)
    met = {condition["type"]: condition for condition in status.get("conditions", [])}
    scheduled = met.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return _unplaced(str(scheduled.get("message", "")))
    for box in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        held = box.get("state", {}).get("waiting", {})
        reason, message = held.get("reason", ""), str(held.get("message", "")).strip()
        if reason in _IMAGE:
            return Trouble(
                f"cannot get image {box.get('image') or _image(pod)!r} ({reason}: {_short(message)}); give another "
                "launcher.options.image, image_pull_secrets or image_pull_policy",
                False,
            )
        if reason in _CONTAINER:
            return Trouble(f"cannot make the container: {_short(message)}", False)
    name = pod["metadata"]["name"]
    for event in reversed(warnings):
        if event["involvedObject"].get("name") == name and event["reason"] in ("FailedMount", "FailedAttachVolume"):
            return Trouble(f"cannot mount a volume: {_short(str(event['message']))}", False)
    return None


def _crash_loop(pod: Object) -> Trouble | None:
    for box in pod.get("status", {}).get("containerStatuses", []):
        held = box.get("state", {}).get("waiting", {})
        if held.get("reason") in ("CrashLoopBackOff", "RunContainerError"):
            why = last_words(pod) or str(held.get("message", ""))
            return Trouble(f"ends as soon as it has started: {_short(why)}", False)
    return None


def _unplaced(message: str) -> Trouble:
    if found := re.search(r'persistentvolumeclaim "([^"]+)" not found', message):
        return Trouble(
            f"waits for PersistentVolumeClaim {found[1]!r}, which is not there; make it, or name another in "
            "launcher.options",
            False,
        )
    if "unbound immediate PersistentVolumeClaims" in message:
        return Trouble("waits for a volume: its PersistentVolumeClaim is not bound yet; see kubectl describe pvc", True)
    return Trouble(f"waits for a place: {_short(message)}", True)


def _job_trouble(job: Object, here: Mapping[int, Object], warnings: Sequence[Object]) -> Trouble | None:
    """Why a job has no pods, or not all."""
    meta, spec = job["metadata"], job.get("spec", {})
    if spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"):
        queue = meta.get("labels", {}).get("kueue.x-k8s.io/queue-name")
        return Trouble(f"waits in Kueue's queue {queue!r}" if queue else "the job is suspended", True)
    made = {pod["metadata"]["name"] for pod in here.values()}
    name = meta["labels"].get(JOB_LABEL, meta["name"])
    for event in reversed(warnings):
        whose = str(event["involvedObject"].get("name", ""))
        ours = re.fullmatch(rf"{re.escape(name)}(-\d+|-node-0|-(master|worker)-\d+)?", whose)
        if event["reason"] != "FailedCreate" or not ours or _has_pods(whose, made):
            continue
        return _refused_pod(str(event["message"]), meta.get("namespace", ""))
    return None


def _refused_pod(message: str, namespace: str) -> Trouble:
    text = message.removeprefix("Error creating: ")
    if "exceeded quota: " in text:
        what = text.partition("exceeded quota: ")[2]
        used = re.search(r"used: ([^ ]*?)(?:, limited|$)", what)
        none_used = used is not None and all(part.rpartition("=")[2] == "0" for part in used[1].split(","))
        return Trouble(
            f"the quota of namespace {namespace!r} refuses a pod: {what}; ask for less in launcher.options"
            + ("" if none_used else ", or wait"),
            not none_used,
        )
    if "must specify" in text and "failed quota" in text:
        return Trouble(
            f"the quota of namespace {namespace!r} wants to know: {text.partition('failed quota: ')[2]}", False
        )
    if found := re.search(r'serviceaccount "([^"]+)" not found', text):
        return Trouble(f"there is no ServiceAccount {found[1]!r} in namespace {namespace!r}; make it", False)
    if "violates PodSecurity" in text:
        return Trouble(f"{_short(text)}; launcher.options.run_as=UID keeps to Pod Security's `restricted`", False)
    return Trouble(f"the cluster refuses a pod: {_short(text)}", False)


def _has_pods(whose: str, made: set[str]) -> bool:
    """True when a job that was once refused a pod has got one since."""
    return any(pod.startswith(f"{whose}-") for pod in made)


def _conditions(job: Object) -> dict[str, Object]:
    """Those that are met."""
    status = job.get("status", {})
    if status.get("jobDeploymentStatus") in ("Complete", "Failed"):  # a RayJob's
        reason = str(status.get("reason", ""))
        return {status["jobDeploymentStatus"]: {"reason": reason, "message": str(status.get("message", ""))}}
    found = status.get("conditions") or []
    return {condition["type"]: condition for condition in found if condition.get("status") == "True"}


def _words(condition: Object) -> str:
    reason, message = str(condition.get("reason", "")), str(condition.get("message", ""))
    return f"{reason}: {message}" if reason and message else reason or message


def _image(pod: Object) -> str:
    return str(pod["spec"]["containers"][0]["image"])


def _nodes(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"node {numbers[0]}"
    return f"nodes {', '.join(map(str, numbers[:8]))}{', ...' if len(numbers) > 8 else ''}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."
