"""The kinds of object by which Kubernetes can run a run's pods, and the manifests of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from unitrain.launchers import _kubernetes_rayjob
from unitrain.launchers._kubernetes_pod import (
    INDEX,
    JOB_LABEL,
    NODE_LABEL,
    Shape,
    command,
    config_map,
    confined,
    environment,
    failure_policy,
    mounts,
    placing,
    pod,
    pod_security,
    resources,
    service,
    volumes,
)

Object = dict[str, Any]


class Kind(ABC):
    """How pods are grouped. `objects` come in the order in which they are made; the last ones run the pods."""

    name: ClassVar[str]
    api: ClassVar[str]  # group/version
    plural: ClassVar[str]
    since: ClassVar[int] = 0  # the least minor version of the server

    def objects(self, shape: Shape) -> list[Object]:
        """The whole of what is sent."""
        return [config_map(shape), *([service(shape)] if self.needs_service(shape) else []), *self.jobs(shape)]

    def needs_service(self, shape: Shape) -> bool:
        """True where nobody else gives the pods names in DNS."""
        return False

    @abstractmethod
    def jobs(self, shape: Shape) -> list[Object]:
        """The objects that run pods."""

    @abstractmethod
    def command(self, shape: Shape) -> list[str]:
        """What each pod runs."""

    def selector(self, name: str) -> str:
        """The pods of the object of that name."""
        return f"{JOB_LABEL}={name}"

    def files(self, shape: Shape) -> dict[str, str]:
        """What goes into the run's folder beside the recipe and the job."""
        return {}

    def num_pods(self, nodes: int) -> int:
        """All that run when the job does."""
        return nodes


class IndexedJob(Kind):
    """One Job whose pods are numbered; a headless Service gives them names."""

    name, api, plural, since = "job", "batch/v1", "jobs", 21

    def needs_service(self, shape: Shape) -> bool:
        """Where there is somebody to meet."""
        return shape.nodes > 1

    def command(self, shape: Shape) -> list[str]:
        """Node 0 is the pod of index 0."""
        return command(shape, "$(NODE)", f"{shape.name}-0.{shape.name}")

    def jobs(self, shape: Shape) -> list[Object]:
        """One."""
        spec = pod(shape, node="$(NODE)", meet=f"{shape.name}-0.{shape.name}")
        if self.needs_service(shape):
            spec = {"subdomain": shape.name, **spec}
        job = {
            "apiVersion": self.api,
            "kind": "Job",
            "metadata": _queued(shape, shape.metadata()),
            "spec": {
                "completionMode": "Indexed",
                "completions": shape.nodes,
                "parallelism": shape.nodes,
                "backoffLimit": shape.wishes.retries * shape.nodes,  # where a run fails, each of its pods does
                **_limits(shape),
                **failure_policy(shape),
                **_suspended(shape),
                "template": {"metadata": {"labels": shape.labels()}, "spec": spec},
            },
        }
        return [job]


class JobPerNode(Kind):
    """A Job for each node, for servers before 1.21, which know no failure policy and no time to live either."""

    name, api, plural = "jobs", "batch/v1", "jobs"

    def needs_service(self, shape: Shape) -> bool:
        """Where there is somebody to meet."""
        return shape.nodes > 1

    def command(self, shape: Shape) -> list[str]:
        """The same words but for the node's number."""
        return command(shape, "$(NODE)", f"{shape.name}-0.{shape.name}")

    def jobs(self, shape: Shape) -> list[Object]:
        """One for each node."""
        return [self._job(shape, node) for node in range(shape.nodes)]

    def _job(self, shape: Shape, node: int) -> Object:
        index = f"metadata.labels['{NODE_LABEL}']"
        host = {"hostname": f"{shape.name}-{node}", "subdomain": shape.name} if self.needs_service(shape) else {}
        spec = pod(shape, node="$(NODE)", meet=f"{shape.name}-0.{shape.name}", index=index)
        labels = shape.labels(**{NODE_LABEL: str(node)})
        return {
            "apiVersion": self.api,
            "kind": "Job",
            "metadata": _queued(shape, shape.metadata(f"{shape.name}-{node}", **{NODE_LABEL: str(node)})),
            "spec": {
                "completions": 1,
                "parallelism": 1,
                "backoffLimit": shape.wishes.retries,
                **{key: value for key, value in _limits(shape).items() if key != "ttlSecondsAfterFinished"},
                **_suspended(shape),
                "template": {"metadata": {"labels": labels}, "spec": {**host, **spec}},
            },
        }


class JobSet(Kind):
    """One JobSet of one Indexed Job: when a pod fails, all are made anew."""

    name, api, plural = "jobset", "jobset.x-k8s.io/v1alpha2", "jobsets"

    def command(self, shape: Shape) -> list[str]:
        """Its pods have names of the JobSet's own."""
        return command(shape, "$(NODE)", f"{shape.name}-node-0-0.{shape.name}")

    def jobs(self, shape: Shape) -> list[Object]:
        """One."""
        limits = _limits(shape)
        ttl = limits.pop("ttlSecondsAfterFinished")
        job = {
            "completionMode": "Indexed",
            "completions": shape.nodes,
            "parallelism": shape.nodes,
            "backoffLimit": 0,  # any pod's failure is the JobSet's
            **limits,
            **failure_policy(shape),
            "template": {
                "metadata": {"labels": shape.labels()},
                "spec": pod(shape, node="$(NODE)", meet=f"{shape.name}-node-0-0.{shape.name}"),
            },
        }
        jobset = {
            "apiVersion": self.api,
            "kind": "JobSet",
            "metadata": _queued(shape, shape.metadata()),
            "spec": {
                **_suspended(shape),
                "ttlSecondsAfterFinished": ttl,
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "successPolicy": {"operator": "All"},
                "failurePolicy": {
                    "maxRestarts": shape.wishes.retries,
                    "restartStrategy": "BlockingRecreate",  # not before the old pods have left volumes and GPUs
                    "rules": [
                        # An exit code that another attempt would end in too.
                        {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                    ],
                },
                "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
            },
        }
        return [jobset]


class TrainJob(Kind):
    """Kubeflow Trainer v2: how pods restart is its runtime's to say."""

    name, api, plural = "trainjob", "trainer.kubeflow.org/v1alpha1", "trainjobs"

    def command(self, shape: Shape) -> list[str]:
        """Its pods are those of a JobSet."""
        return command(shape, "$(NODE)", f"{shape.name}-node-0-0.{shape.name}")

    def jobs(self, shape: Shape) -> list[Object]:
        """One, which patches what its runtime has no key for."""
        wishes = shape.wishes
        pods: Object = {
            "terminationGracePeriodSeconds": wishes.pod_seconds,
            **{key: value for key, value in placing(wishes).items() if key != "priorityClassName"},
            "volumes": volumes(shape),
            "containers": [{"name": "node", "volumeMounts": mounts(wishes), **confined(wishes)}],
        }
        if wishes.run_as:
            pods["securityContext"] = pod_security(wishes)
        trainer = {
            "image": wishes.image,
            "command": self.command(shape),
            "numNodes": shape.nodes,
            "numProcPerNode": shape.nproc,
            "resourcesPerNode": resources(wishes),
            "env": environment(shape, INDEX),
        }
        # A JobSet of Jobs of pods: the patch goes down to the pods of the job that trains.
        job = {"name": "node", "template": {"spec": {"template": {"spec": pods}}}}
        runtime = {"template": {"spec": {"replicatedJobs": [job]}}}
        spec: Object = {
            **_suspended(shape),
            "runtimeRef": {"name": wishes.runtime},
            "trainer": {key: value for key, value in trainer.items() if value != {}},
            "runtimePatches": [{"manager": "unitrain.dev/launcher", "trainingRuntimeSpec": runtime}],
        }
        if wishes.deadline_seconds is not None:
            spec["activeDeadlineSeconds"] = wishes.deadline_seconds
        return [
            {"apiVersion": self.api, "kind": "TrainJob", "metadata": _queued(shape, shape.metadata()), "spec": spec}
        ]

    def selector(self, name: str) -> str:
        """By the JobSet that it becomes."""
        return f"jobset.sigs.k8s.io/jobset-name={name}"


class PyTorchJob(Kind):
    """Kubeflow's training operator v1: a Master, which is node 0, and Workers."""

    name, api, plural = "pytorchjob", "kubeflow.org/v1", "pytorchjobs"

    def command(self, shape: Shape) -> list[str]:
        """The operator numbers pods by $(RANK), and makes a service for the Master."""
        return command(shape, "$(RANK)", f"{shape.name}-master-0")

    def jobs(self, shape: Shape) -> list[Object]:
        """One."""
        spec = pod(shape, node="$(RANK)", meet=f"{shape.name}-master-0", container="pytorch", index=None)
        del spec["restartPolicy"]  # the replica's own key says it
        replica = {
            # In place. Exit codes up to 127 would end the job with ExitCode, and 75 should not.
            "restartPolicy": "OnFailure",
            "template": {"metadata": {"labels": shape.labels()}, "spec": spec},
        }
        replicas: Object = {"Master": {"replicas": 1, **replica}}
        if shape.nodes > 1:
            replicas["Worker"] = {"replicas": shape.nodes - 1, **replica}
        policy: Object = {
            "cleanPodPolicy": "None",  # the logs stay
            "backoffLimit": shape.wishes.retries * shape.nodes,
            **_limits(shape),
            **_suspended(shape),
        }
        body = {"runPolicy": policy, "pytorchReplicaSpecs": replicas}
        return [
            {"apiVersion": self.api, "kind": "PyTorchJob", "metadata": _queued(shape, shape.metadata()), "spec": body}
        ]


class RayJob(Kind):
    """KubeRay's: a Ray cluster of the run's own, in which our driver is the job."""

    name, api, plural = "rayjob", "ray.io/v1", "rayjobs"

    def command(self, shape: Shape) -> list[str]:
        """The entrypoint; pods run Ray."""
        return _kubernetes_rayjob.driver(shape)

    def files(self, shape: Shape) -> dict[str, str]:
        """The driver's plan."""
        return {name: text(shape) for name, text in _kubernetes_rayjob.FILES.items()}

    def num_pods(self, nodes: int) -> int:
        """With the head, and the one that submits."""
        return nodes + _kubernetes_rayjob.FIRST_WORKER

    def jobs(self, shape: Shape) -> list[Object]:
        """One."""
        spec = {**_limits(shape), **_suspended(shape), **_kubernetes_rayjob.spec(shape)}
        return [{"apiVersion": self.api, "kind": "RayJob", "metadata": _queued(shape, shape.metadata()), "spec": spec}]


ON_REQUEST = ("pytorchjob", "rayjob")
# The others in the order in which they are chosen.
KINDS: Mapping[str, Kind] = MappingProxyType(
    {kind.name: kind for kind in (TrainJob(), JobSet(), IndexedJob(), JobPerNode(), PyTorchJob(), RayJob())}
)
CHOSEN = tuple(name for name in KINDS if name not in ON_REQUEST)


def choose(apis: Container[str], minor: int) -> Kind:
    """The best kind that a server of version 1.`minor` with these group/versions has."""
    return next(KINDS[name] for name in CHOSEN if KINDS[name].api in apis and minor >= KINDS[name].since)


def _limits(shape: Shape) -> Object:
    deadline = shape.wishes.deadline_seconds
    found: Object = {} if deadline is None else {"activeDeadlineSeconds": deadline}
    return {**found, "ttlSecondsAfterFinished": shape.wishes.keep_seconds}


def _queued(shape: Shape, metadata: Object) -> Object:
    """With the queue from which Kueue takes it."""
    if shape.wishes.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = shape.wishes.queue
    return metadata


def _suspended(shape: Shape) -> Object:
    """Until Kueue says otherwise; only then, or nobody would."""
    return {"suspend": True} if shape.wishes.queue is not None else {}
