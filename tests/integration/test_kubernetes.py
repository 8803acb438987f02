"""Runs in pods of a real Kubernetes: trained, killed, deleted, resumed, and refused with one clear message."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from unitrain.launcher import Job
from unitrain.launchers._kubernetes_cluster import Cluster, lost_fields, plural_of
from unitrain.launchers._kubernetes_kinds import KINDS
from unitrain.launchers._kubernetes_pod import object_name
from unitrain.launchers._kubernetes_yaml import from_text
from unitrain.launchers.kubernetes import MANIFEST, Kubernetes
from unitrain.run import Run

from ..lab.kubernetes_system import LAB, Lab, processes
from .runs import COMMAND, Ended, unitrain

CRD_SERVER = "https://127.0.0.1:16444"
SLOW = """
import time
from unitrain.tasks import Classification

class Slow(Classification):
    def step(self, batch):
        time.sleep(0.1)
        return super().step(batch)
"""
RECIPE = """
name: digits
trainer: slow.py:Slow
model: {name: mlp, in_features: 64, hidden: [32], num_classes: 10}
data: {name: digits}
optimizer: {lr: 3e-3}
train: {steps: 40, global_batch: 32, log_every: 1, eval_every: 0}
checkpoint: {every: 10}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("api", "node", "crds") as up:
        yield up


@pytest.fixture
def folder(lab: Lab) -> Iterator[Path]:
    """Seen by pods under the same path; afterwards nothing of its runs is left."""
    made = lab.folder()
    (made / "slow.py").write_text(SLOW)
    (made / "recipe.yaml").write_text(RECIPE)
    yield made
    for name in ("jobs", "pods", "configmaps", "resourcequotas"):  # services go with the jobs that own them
        root = "/apis/batch/v1" if name == "jobs" else "/api/v1"
        query = "?propagationPolicy=Background&gracePeriodSeconds=1"
        lab.ask("DELETE", f"{root}/namespaces/default/{name}{query}")
    eventually(lambda: not lab.pods(), 60)
    shutil.rmtree(made, ignore_errors=True)


def eventually(true: Callable[[], Any], seconds: float = 60.0, *, every: float = 0.2) -> Any:
    """What it returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(every)
    return found


def asked(lab: Lab, nodes: int = 1, nproc: int = 1, **options: Any) -> str:
    """The override that has the launcher start pods in this lab."""
    given = {"kind": "jobs", **lab.options, **options}
    shape = {"name": "kubernetes", "nodes": nodes, "nproc": nproc, "options": given}
    return f"launcher={json.dumps(shape)}"


def launch(folder: Path, launcher: str, *more: str, name: str = "digits-1") -> Ended:
    words = ["launch", "recipe.yaml", "--run-dir", str(folder / name), launcher]
    return unitrain(*words, *more, cwd=folder)


def submit(folder: Path, launcher: str, *more: str, name: str = "digits-1") -> Run:
    """The run, of which a pod has made at least twelve steps."""
    launch(folder, launcher, "--detach", *more, name=name).succeeded()
    run = Run(folder / name)
    eventually(lambda: steps(run)[-1:] >= [12], 120)
    return run


def steps(run: Run) -> list[int]:
    return [record["step"] for record in run.metrics() if record["split"] == "train"]


def losses(run: Run) -> list[float]:
    return [record["loss"] for record in run.metrics() if record["split"] == "train"]


def state(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(unitrain("status", str(run.folder), "--json", cwd=run.folder).succeeded().out)
    return found


# --- training ----------------------------------------------------------------------------------------------------


def test_a_recipe_trains_in_pods_as_it_does_here(lab: Lab, folder: Path) -> None:
    short = "train.steps=15"
    ended = launch(folder, asked(lab, nodes=2), short).succeeded()
    assert "pods: 2 running" in ended.err
    assert "step 15/15" in ended.out, "what rank 0 prints is heard where the run was launched"
    here = ["launcher={name: local, nproc: 2}", short]
    unitrain("launch", "recipe.yaml", "--run-dir", str(folder / "here"), *here, cwd=folder).succeeded()
    run, reference = Run(folder / "digits-1"), Run(folder / "here")
    assert steps(run) == list(range(1, 16))
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
    assert (state(run)["state"], state(run)["exit_code"]) == ("done", 0)
    assert processes(run.folder) == []


def jobs(lab: Lab) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = lab.ask("GET", "/apis/batch/v1/namespaces/default/jobs")["items"]
    return found


def test_a_run_goes_on_where_a_pod_was_killed(lab: Lab, folder: Path, full_drills: bool) -> None:
    """Without a signal that anybody could catch: node 1's, and in the drill node 0's too, where the others meet."""
    victims = [1, 0, 1] if full_drills else [1]
    launcher = asked(lab, nodes=2, rejoin_seconds=20, grace_seconds=10, retries=6)
    run = submit(folder, launcher, f"train.steps={40 * len(victims)}")
    for number, node in enumerate(victims):
        before = steps(run)[-1]
        (first,) = [pod["metadata"]["name"] for pod in running(lab, node)]
        for line in processes(run.folder):
            if f"--node\0{node}\0" in line:
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)
        eventually(lambda lost=first, node=node: running(lab, node, but=lost), 120)
        if number + 1 < len(victims):
            eventually(lambda before=before: steps(run)[-1] > before + 2, 180)
    follow(run, folder)
    assert steps(run) == list(range(1, 40 * len(victims) + 1)), "each step once"
    assert state(run)["exit_code"] == 0


def running(lab: Lab, node: int, *, but: str = "") -> list[dict[str, Any]]:
    """A node's pods that run; those of one name aside."""
    return [
        pod
        for pod in lab.pods()
        if pod["metadata"]["labels"]["unitrain.dev/node"] == str(node)
        and pod["status"]["phase"] == "Running"
        and pod["metadata"]["name"] != but
    ]


def follow(run: Run, folder: Path) -> None:
    """Until the run has ended."""
    eventually(lambda: state(run)["state"] not in ("pending", "running"), 180, every=1.5)


def test_a_deleted_pod_has_saved_and_its_successor_goes_on(lab: Lab, folder: Path) -> None:
    run = submit(folder, asked(lab))
    (pod,) = lab.pods()
    lab.ask("DELETE", f"/api/v1/namespaces/default/pods/{pod['metadata']['name']}")
    follow(run, folder)
    assert steps(run) == list(range(1, 41)), "each step once"
    assert state(run)["exit_code"] == 0
    codes = [event["exit_code"] for event in run.events() if event["event"] == "stop" and "exit_code" in event]
    assert (codes[0], codes[-1]) == (75, 0)
    (job,) = jobs(lab)
    assert job["metadata"]["name"] == f"{object_name(run.folder, 0)}-0"


def test_a_cancelled_run_has_saved_and_leaves_nothing(lab: Lab, folder: Path) -> None:
    run = submit(folder, asked(lab))
    said = unitrain("cancel", str(run.folder), "--grace", "20", cwd=folder).succeeded().out
    assert "preempted" in said
    last = steps(run)[-1]
    assert (state(run)["state"], state(run)["exit_code"]) == ("preempted", 75)
    assert lab.pods() == []
    assert jobs(lab) == []
    assert processes(run.folder) == []
    unitrain("resume", str(run.folder), f"train.steps={last + 5}", cwd=folder).succeeded()
    assert steps(run) == list(range(1, last + 6)), "no step was lost or done twice"
    (job,) = jobs(lab)
    assert job["metadata"]["name"] == f"{object_name(run.folder, 1)}-0"


def test_a_run_in_a_volume_that_only_pods_see_is_followed_through_the_server(lab: Lab, folder: Path) -> None:
    """Its folder here has the recipe and the state; logs and exit code come from the pods."""
    (folder / "volume").mkdir()
    hidden = {"volume": {"host_path": str(folder / "volume"), "path": "/volume", "here": "/nowhere"}}
    mounts = [*lab.options["mounts"], {"host_path": str(folder), "path": str(folder), "read_only": True}]
    launcher = asked(lab, nproc=2, **hidden, mounts=mounts, grace_seconds=10)
    launch(folder, launcher, f"trainer={folder / 'slow.py'}:Slow", "train.steps=400", "--detach").succeeded()
    run, inside = Run(folder / "digits-1"), Run(folder / "volume" / "digits-1")
    eventually(lambda: steps(inside)[-1:] >= [2], 120)
    logs = [COMMAND, "logs", run.folder, "--follow"]
    with subprocess.Popen(logs, cwd=folder, stdout=subprocess.PIPE, text=True) as log:
        assert log.stdout is not None
        assert any("loss" in line for line in log.stdout)
        unitrain("logs", str(run.folder), "--rank", "1", cwd=folder).succeeded()
        refused = unitrain("logs", str(run.folder), "--rank", "7", cwd=folder)
        assert "no log of rank 7; ranks with logs: 0, 1" in refused.last_line
        unitrain("cancel", str(run.folder), "--grace", "20", cwd=folder).succeeded()
        log.communicate(timeout=30)
    assert (state(run)["state"], state(run)["exit_code"]) == ("preempted", 75)
    assert steps(run) == []
    assert inside.recipe_path.read_text() == run.recipe_path.read_text()


# --- refusals ----------------------------------------------------------------------------------------------------


def one_message(ended: Ended) -> str:
    """The only line that tells of the trouble, and no traceback."""
    assert ended.code != 0
    assert "Traceback" not in ended.out + ended.err
    return ended.last_line


def test_an_image_that_cannot_be_had_is_one_message(lab: Lab, folder: Path) -> None:
    message = one_message(launch(folder, asked(lab, image="localhost/wrong:1", give_up_seconds=2)))
    assert "node 0 cannot get image 'localhost/wrong:1' (ErrImageNeverPull" in message
    assert "give another launcher.options.image" in message
    assert lab.pods() == []


def test_a_claim_that_is_not_there_is_one_message(lab: Lab, folder: Path) -> None:
    message = one_message(launch(folder, asked(lab, mounts=[{"claim": "data", "path": "/data"}])))
    assert "there is no PersistentVolumeClaim 'data' in namespace 'default'" in message
    assert jobs(lab) == []


def test_a_claim_that_goes_away_meanwhile_is_one_message(lab: Lab, folder: Path) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    path = "/api/v1/namespaces/default/persistentvolumeclaims"
    lab.ask("POST", path, claim)
    mounts = [*lab.options["mounts"], {"claim": "data", "path": "/data"}]
    launch(folder, asked(lab, mounts=mounts), "--detach").succeeded()
    run = Run(folder / "digits-1")
    try:
        assert "is not bound yet" in eventually(lambda: "claim" in (text := state(run)["detail"].lower()) and text, 30)
    finally:
        lab.ask("DELETE", f"{path}/data")
        lab.ask("PATCH", f"{path}/data", {"metadata": {"finalizers": None}})
    unitrain("cancel", str(run.folder), cwd=folder).succeeded()
    assert state(run)["state"] == "cancelled"


def test_a_quota_that_is_too_small_is_one_message(lab: Lab, folder: Path) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "small"},
        "spec": {"hard": {"requests.memory": "64Mi"}},
    }
    lab.ask("POST", "/api/v1/namespaces/default/resourcequotas", quota)
    message = one_message(launch(folder, asked(lab, memory="1Gi", give_up_seconds=2)))
    assert message.startswith("the quota of namespace 'default' refuses a pod: small, requested: requests.memory=1Gi")
    assert "ask for less in launcher.options" in message
    assert jobs(lab) == []


def test_a_right_that_one_lacks_is_one_message(lab: Lab, folder: Path) -> None:
    message = one_message(launch(folder, asked(lab, kubeconfig=str(LAB / "kubeconfig-alice"))))
    assert "you lack a right in the cluster" in message
    assert 'User "alice" cannot create resource "configmaps"' in message
    assert lab.ask("GET", "/api/v1/namespaces/default/configmaps?labelSelector=unitrain.dev/job")["items"] == []


def test_a_server_that_does_not_answer_is_one_message(lab: Lab, folder: Path) -> None:
    text = (LAB / "kubeconfig").read_text().replace("16443", "16499")
    (folder / "kubeconfig").write_text(text)
    message = one_message(launch(folder, asked(lab, kubeconfig=str(folder / "kubeconfig"))))
    assert "the Kubernetes API server at https://127.0.0.1:16499 does not answer" in message


def test_a_kind_that_the_cluster_lacks_is_one_message(lab: Lab, folder: Path) -> None:
    message = one_message(launch(folder, asked(lab, kind="job")))
    assert "this cluster (v1.20.2) has no job of batch/v1; leave launcher.options.kind out for 'jobs'" in message


# --- schemas -----------------------------------------------------------------------------------------------------


def objects(kind: str) -> list[dict[str, Any]]:
    options = {
        "image": "registry.example.org/team/unitrain:1",
        "volume": {"claim": "runs"},
        "kind": kind,
        "gpus": 4,
        "cpu": 8,
        "memory": "32Gi",
        "shm": "8Gi",
        "env": {"A": "b", "HF_TOKEN": {"secret": "hf", "key": "token"}},
        "node_selector": {"pool": "a100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "image_pull_secrets": ["registry"],
        "service_account": "trainer",
        "run_as": 1000,
        "deadline_seconds": 3600,
        **({} if kind == "jobs" else {"queue": "team-a"}),  # servers of that age know no suspended jobs
    }
    job = Job(run_id="gpt-1", run_dir=Path("/nowhere/gpt-1"), nodes=2, nproc=4, options=options)
    return from_text(Kubernetes().render(job).files[MANIFEST])


def inside_runtime(job_set: dict[str, Any]) -> dict[str, Any]:
    """A JobSet where the schema of ClusterTrainingRuntime holds that of JobSet, and so that of Job."""
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "ClusterTrainingRuntime",
        "metadata": {"name": "gpt-1"},
        "spec": {"mlPolicy": {"numNodes": 2}, "template": {"metadata": {}, "spec": job_set["spec"]}},
    }


def sent(lab: Lab, kind: str, change: Callable[[dict[str, Any]], None] = lambda body: None) -> dict[str, Any]:
    """What the custom-resource server of 1.36 answers to the object that runs pods."""
    body = copy.deepcopy(objects(kind)[-1])
    change(body)
    plural, namespace = KINDS[kind].plural, "/namespaces/default"
    if kind == "jobset":
        body, plural, namespace = inside_runtime(body), "clustertrainingruntimes", ""
    query = "?dryRun=All&fieldValidation=Strict"
    answer: dict[str, Any] = lab.ask(
        "POST", f"/apis/{body['apiVersion']}{namespace}/{plural}{query}", body, server=CRD_SERVER
    )
    return answer


CUSTOM = ("trainjob", "jobset", "pytorchjob", "rayjob")


@pytest.mark.parametrize("kind", CUSTOM)
def test_a_server_of_today_knows_every_field_of_a_custom_object(lab: Lab, kind: str) -> None:
    answer = eventually(lambda: (found := sent(lab, kind))["kind"] != "Status" and found, 30)
    assert answer["metadata"]["name"].startswith("gpt-1")


def _misspell(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        place: Any = body
        for key in path[:-1]:
            place = place[key]
        place[f"{path[-1]}s"] = place.pop(path[-1])

    return change


@pytest.mark.parametrize(
    ("kind", "path", "said"),
    [
        ("trainjob", ("spec", "trainer", "numNodes"), 'unknown field "spec.trainer.numNodess"'),
        ("trainjob", ("spec", "runtimePatches", 0, "trainingRuntimeSpec"), "unknown field"),
        ("jobset", ("spec", "failurePolicy", "maxRestarts"), 'unknown field "spec.template.spec.failurePolicy'),
        ("pytorchjob", ("spec", "runPolicy", "backoffLimit"), 'unknown field "spec.runPolicy.backoffLimits"'),
        ("rayjob", ("spec", "shutdownAfterJobFinishes"), 'unknown field "spec.shutdownAfterJobFinishess"'),
        (
            "rayjob",
            ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "groupName"),
            'unknown field "spec.rayClusterSpec.workerGroupSpecs[0].groupNames"',
        ),
    ],
)
def test_a_misspelt_field_is_refused_by_the_same_server(lab: Lab, kind: str, path: tuple[Any, ...], said: str) -> None:
    eventually(lambda: sent(lab, kind)["kind"] != "Status", 30)
    assert said in sent(lab, kind, _misspell(*path))["message"]


def test_the_old_server_keeps_every_field_of_its_kinds(lab: Lab) -> None:
    """That of 1.20 drops unknown fields without a word; the launcher compares, and so does this."""
    cluster = Cluster(kubeconfig=str(LAB / "kubeconfig"))
    for body in objects("jobs"):
        made = cluster.create(body, plural=plural_of(body, "jobs"), dry_run=True)
        assert list(lost_fields(body, made)) == []
    (indexed,) = [body for body in objects("job") if body["kind"] == "Job"]
    made = cluster.create(indexed, plural="jobs", dry_run=True)
    assert {"spec.completionMode", "spec.podFailurePolicy"} <= set(lost_fields(indexed, made))
