"""What the Kubernetes launcher decides without a cluster: names, options, manifests, reasons, files in pods."""

from __future__ import annotations

import copy
import json
import re
import socket
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from unitrain.agent import unpack
from unitrain.agent.records import EXIT, read_record, write_record
from unitrain.errors import UnitrainError, UserError
from unitrain.launcher import Job
from unitrain.launchers._kubernetes_cluster import lost_fields
from unitrain.launchers._kubernetes_kinds import KINDS, choose
from unitrain.launchers._kubernetes_options import OWN, Wishes, quantity
from unitrain.launchers._kubernetes_pod import LONGEST_NAME, object_name, sees_folder
from unitrain.launchers._kubernetes_rules import broken, pod_templates
from unitrain.launchers._kubernetes_state import State, submissions
from unitrain.launchers._kubernetes_watch import ended, last_words, node_of, phases, waiting
from unitrain.launchers._kubernetes_yaml import from_text, to_text
from unitrain.launchers.kubernetes import MANIFEST, Kubernetes
from unitrain.recipe import CheckpointRecipe, LauncherRecipe, Recipe

pytestmark = pytest.mark.fast

IMAGE = {"image": "registry.example.org/team/unitrain:1"}
BASE: dict[str, Any] = {**IMAGE, "volume": {"claim": "runs"}}


def recipe(nodes: int = 1, nproc: int = 2, path: str | None = None, **options: Any) -> Recipe:
    launcher = LauncherRecipe(name="kubernetes", nodes=nodes, nproc=nproc, options=options)
    return Recipe(trainer="mine:Mine", launcher=launcher, checkpoint=CheckpointRecipe(path=path))


def objects(kind: str, nodes: int = 2, nproc: int = 4, **options: Any) -> list[dict[str, Any]]:
    job = Job(
        run_id="gpt-1",
        run_dir=Path("/nowhere/gpt-1"),
        nodes=nodes,
        nproc=nproc,
        options=BASE | {"kind": kind} | options,
    )
    return from_text(Kubernetes().render(job).files[MANIFEST])


def refusals(asked: Recipe) -> list[str]:
    return [f"{problem.what}; {problem.instead}" for problem in Kubernetes.problems(asked)]


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_id", "number", "name"),
    [
        ("gpt-tiny-20261120-144601-ab12", 0, r"gpt-tiny-20261120-144601-ab12"),
        ("gpt-tiny-20261120-144601-ab12", 3, r"gpt-tiny-20261120-144601-ab12-r3"),
        ("gpt_tiny-20261120-144601-ab12", 0, r"gpt-tiny-20261120-144601-ab12-[0-9a-f]{6}"),
        ("gpt-1", 3, r"gpt-1-[0-9a-f]{6}-r3"),
        ("GPT", 0, r"gpt-[0-9a-f]{6}"),
        ("1st", 0, r"run-1st-[0-9a-f]{6}"),
        ("a" * 63, 12, r"a{29}-[0-9a-f]{6}-r12"),
    ],
)
def test_objects_are_named_after_the_run(run_id: str, number: int, name: str) -> None:
    assert re.fullmatch(name, object_name(Path("/runs") / run_id, number))


@given(st.text(alphabet=string.ascii_letters + string.digits + "._-", min_size=1, max_size=63), st.integers(0, 999))
def test_every_name_keeps_to_rfc_1035_and_leaves_room_for_endings(run_id: str, number: int) -> None:
    name = object_name(Path("/runs") / run_id, number)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
    assert len(name) <= LONGEST_NAME


def test_two_runs_never_have_the_same_name() -> None:
    ids = ["gpt_1", "gpt.1", "gpt-1", "GPT-1", "gpt--1", "a" * 50, "a" * 51, "a" * 52]
    folders = [Path(runs) / run_id for run_id in ids for runs in ("/data/a/runs", "/data/b/runs")]
    assert len({object_name(folder, 0) for folder in folders}) == len(folders)


def test_the_name_changes_with_every_submission_of_a_run(tmp_path: Path) -> None:
    assert submissions(tmp_path) == 0
    lines = [{"time": 1.0, "event": "launch", "launcher": name} for name in ("kubernetes", "local", "kubernetes")]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert submissions(tmp_path) == 2


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "what", "instead"),
    [
        (recipe(volume={"claim": "runs"}), "no image", "launcher.options.image="),
        (recipe(**BASE, imagee="x"), "'imagee', did you mean 'image'?", "image_pull_policy"),
        (recipe(**BASE, kind="pod"), "kind is 'pod'", "trainjob, jobset, job, jobs, pytorchjob, rayjob"),
        (recipe(**IMAGE), "lost with its pod", "{claim: NAME}"),
        (recipe(2, **IMAGE, kind="job"), "2 pods have no folder", "several machines may write"),
        (recipe(**BASE, gpus=4), "2 ranks cannot have one each of 4 GPUs", "launcher.nproc=4"),
        (recipe(**BASE, grace_seconds=60, termination_seconds=60), "before its ranks have had", "at least 75"),
        (recipe(**BASE, shm="2Gi", memory="1Gi"), "shm=2Gi is more than", "more memory"),
        (recipe(**BASE, env={"HF_TOKEN": "hf_123"}), "for everybody to read", "{secret: NAME, key: KEY}"),
        (recipe(**BASE, kind="trainjob", env_from=["s"]), "no place for launcher.options.env_from", "kind=jobset"),
        (recipe(**BASE, mounts=[{"claim": "d", "path": "/runs"}]), "two volumes are mounted at /runs", "another path"),
        (recipe(**BASE, mounts=[{"claim": "d"}]), "mounts is", "path: /WHERE"),
        (recipe(**BASE, kind="pytorchjob", meet="shared"), "meet by DNS", "kind=jobs"),
        (recipe(**BASE, kind="rayjob", meet="shared"), "meet through Ray", "leave launcher.options.meet out"),
        (recipe(**IMAGE, path="s3://bucket/run", kind="rayjob"), "share a folder", "launcher.options.volume"),
        (recipe(**BASE, grace_seconds="soon"), "grace_seconds is 'soon'", "a day"),
    ],
)
def test_a_refusal_comes_with_an_alternative(asked: Recipe, what: str, instead: str) -> None:
    (sentence,) = refusals(asked)
    assert what in sentence
    assert instead in sentence


@pytest.mark.parametrize(
    "asked",
    [
        recipe(**BASE),
        recipe(4, 8, **BASE, gpus=8, cpu=32, memory="256Gi", shm="64Gi", queue="team-a", run_as=1000),
        recipe(**IMAGE, path="s3://bucket/run"),
        recipe(**BASE, env={"A": 1, "TOKENIZERS_PARALLELISM": "false", "HF_TOKEN": {"secret": "hf", "key": "token"}}),
        recipe(**IMAGE, volume={"host_path": "/shared/runs"}, tolerations=[{"operator": "Exists"}]),
        recipe(**BASE, min_nodes=1, join_seconds=60, rejoin_seconds=60, entry="mine:main"),
    ],
)
def test_what_fits_is_no_problem(asked: Recipe) -> None:
    assert refusals(asked) == []


HOSTILE = [
    "x\ny: z",
    "x\n---\nkind: Pod",
    "x; touch /tmp/owned",
    "$(touch /tmp/owned)",
    "`id`",
    "../../etc",
    "--privileged",
    "-x",
    "a b",
    "\x00",
    "{a: b}",
    "!!python/object:os.system",
    "x" * 300,
    "é\u2028",
    "*alias",
    "&anchor a",
]
LINES = {"annotations", "env"}  # hold text of any kind, as values


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", sorted(set(OWN) - LINES))
def test_no_option_takes_a_value_that_could_be_anything_else(name: str, hostile: str) -> None:
    inside = [hostile, [hostile], {hostile: "x"}, {"x": hostile}, {"claim": hostile}, {"host_path": f"/x{hostile}\n"}]
    inside += [[{"secret": hostile, "path": "/x"}], [{"claim": "x", "path": hostile}], [{"key": hostile}]]
    for value in inside:
        assert not OWN[name].accepts(value) or _harmless(name, hostile), (name, value)


def _harmless(name: str, hostile: str) -> bool:
    """A path and a file's name may hold what no shell ever sees; a context is looked up in the user's own file."""
    return name in ("kubeconfig", "workdir", "context") and hostile.isprintable() and not hostile.startswith("-")


@given(st.text(), st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_value_is_read_back_as_it_was_written(name: str, value: str) -> None:
    printable = "".join(filter(str.isprintable, value))
    written = [{"metadata": {"annotations": {"x": printable}}, "env": [{"name": "A", "value": printable}]}]
    assert from_text(to_text(written)) == written


@pytest.mark.parametrize(
    "word", ["yes", "NO", "1e3", "0x1f", "010", "1_000", "null", "~", "", "2026-11-20", ".inf", "=", "<<"]
)
def test_a_doubtful_word_stands_in_quotes(word: str) -> None:
    """YAML 1.1 and 1.2, Python's and Go's, differ in what they take for a number or a date."""
    assert to_text([{"value": word}]) == f"value: '{word}'\n"


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_adds_no_key_and_no_document(hostile: str) -> None:
    if not hostile.isprintable():
        assert refusals(recipe(**BASE, env={"A": hostile}))
        return
    plain = objects("job", env={"A": "x"}, annotations={"note": "x"})
    found = objects("job", env={"A": hostile}, annotations={"note": hostile})
    assert _shape(found) == _shape(plain)
    ((_, spec),) = pod_templates(found)
    (value,) = [entry["value"] for entry in spec["containers"][0]["env"] if entry["name"] == "A"]
    assert value.replace("$$(", "$(") == hostile
    assert "$(" not in value.replace("$$(", ""), "Kubernetes would replace it"


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    return [_shape(item) for item in value] if isinstance(value, list) else type(value)


def test_a_run_whose_folder_has_an_odd_name_is_refused() -> None:
    job = Job(run_id="a b", run_dir=Path("/runs/a b;c"), nodes=1, nproc=1, options=BASE)
    with pytest.raises(UserError, match="give a --run-dir whose name has letters"):
        Kubernetes().render(job)


def test_quantities_compare_as_numbers() -> None:
    assert quantity("1Gi") > quantity("1G") > quantity("900M") > quantity(1) > quantity("500m")
    with pytest.raises(ValueError, match="no quantity"):
        quantity("lots")


# --- manifests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_objects_of_every_kind_fit_each_other(kind: str, nodes: int) -> None:
    found = objects(kind, nodes, gpus=4, memory="32Gi", queue="team-a")
    assert broken(found, grace_seconds=30, nproc=4) == []
    for _, spec in pod_templates(found):
        assert spec["terminationGracePeriodSeconds"] == 45


def change(found: list[dict[str, Any]], path: str, value: Any) -> list[dict[str, Any]]:
    """A copy in which one value is another; `path` leads to it through kinds, keys and numbers."""
    kind, *keys = path.split("/")
    mine = copy.deepcopy(found)
    place = next(each for each in mine if each["kind"] == kind)
    for key in keys[:-1]:
        place = place[int(key)] if isinstance(place, list) else place[key]
    last: Any = int(keys[-1]) if isinstance(place, list) else keys[-1]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return mine


POD = "Job/spec/template/spec"
BOX = f"{POD}/containers/0"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("Service/spec/selector", {"app": "other"}, "selects"),
        (f"{POD}/subdomain", "other", "no service of that name"),
        ("Service/metadata/name", "other", "gives no names to pods of subdomain"),
        ("Service/spec/ports/0/port", 29400, "other ports than its pods"),
        (f"{BOX}/ports/0/containerPort", 29400, "nodes meet at port 29500"),
        (f"{BOX}/resources/limits/nvidia.com~gpu", "8", "4 ranks cannot have one each of 8"),
        (f"{POD}/terminationGracePeriodSeconds", 30, "killed 30 s after SIGTERM"),
        (f"{POD}/terminationGracePeriodSeconds", None, "killed 30 s after SIGTERM"),
        (f"{POD}/volumes/0/configMap/name", "other", "not among the objects"),
        (f"{BOX}/volumeMounts/0/name", "lost", "mounts lost, which the pod has not"),
        (f"{BOX}/volumeMounts/0/mountPath", "/runs", "two volumes at /runs"),
        (f"{BOX}/command/0", "/bin/sh", "keeps SIGTERM from the agent"),
        ("Job/metadata/name", "Gpt_1", "cannot be named 'Gpt_1'"),
        ("Job/metadata/name", "g" * 60, "cannot be named"),
        ("Job/spec/parallelism", 1, "1 of 2 nodes would run"),
        ("Job/spec/suspend", True, "needs both or neither"),
        ("ConfigMap/data/recipe.yaml", "x" * 1_000_000, "a ConfigMap takes"),
    ],
)
def test_objects_that_do_not_fit_are_told_apart(path: str, value: Any, sentence: str) -> None:
    found = objects("job", gpus=4)
    spelled = [key.replace("~", "/") for key in path.split("/")]
    mine = change(found, path, value) if "~" not in path else _deep(found, spelled, value)
    assert any(sentence in each for each in broken(mine, grace_seconds=30, nproc=4))


def _deep(found: list[dict[str, Any]], keys: list[str], value: Any) -> list[dict[str, Any]]:
    mine = copy.deepcopy(found)
    place: Any = next(each for each in mine if each["kind"] == keys[0])
    for key in keys[1:-1]:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[keys[-1]] = value
    return mine


@pytest.mark.parametrize(
    ("apis", "minor", "kind"),
    [
        ({"batch/v1", "jobset.x-k8s.io/v1alpha2", "trainer.kubeflow.org/v1alpha1"}, 34, "trainjob"),
        ({"batch/v1", "jobset.x-k8s.io/v1alpha2"}, 30, "jobset"),
        ({"batch/v1", "kubeflow.org/v1"}, 30, "job"),
        ({"batch/v1"}, 21, "job"),
        ({"batch/v1"}, 20, "jobs"),
    ],
)
def test_the_best_kind_of_the_cluster_is_chosen(apis: set[str], minor: int, kind: str) -> None:
    assert choose(apis, minor).name == kind


def test_secrets_are_named_and_never_written() -> None:
    env = {"HF_TOKEN": {"secret": "hf", "key": "token"}}
    ((_, spec),) = pod_templates(objects("job", env=env, env_from=["s3"]))
    box = spec["containers"][0]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}} in box["env"]
    assert box["envFrom"] == [{"secretRef": {"name": "s3"}}]


def test_without_retries_nothing_is_started_again() -> None:
    (job,) = [each for each in objects("job", retries=0) if each["kind"] == "Job"]
    assert job["spec"]["backoffLimit"] == 0
    assert [rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"]] == ["FailJob"]


def test_a_folder_that_both_sides_see_has_one_place_in_the_volume() -> None:
    wishes = Wishes.of({**IMAGE, "volume": {"claim": "c", "path": "/vol", "here": "/nfs/vol"}})
    assert sees_folder(Path("/nfs/vol/a/gpt-1"), wishes)
    assert not sees_folder(Path("/elsewhere/runs/gpt-1"), wishes)
    job = Job(
        run_id="gpt-1", run_dir=Path("/nfs/vol/a/gpt-1"), nodes=1, nproc=1, options={**IMAGE, "volume": wishes.volume}
    )
    assert "/vol/a/gpt-1" in Kubernetes().render(job).argv


def test_what_an_old_server_drops_is_noticed() -> None:
    sent = {"spec": {"completionMode": "Indexed", "template": {"env": [{"name": "A"}, {"name": "B", "value": "x"}]}}}
    got = {"spec": {"template": {"env": [{"name": "A"}, {"name": "B"}], "dnsPolicy": "ClusterFirst"}}}
    assert list(lost_fields(sent, got)) == ["spec.completionMode", "spec.template.env[1].value"]
    assert list(lost_fields(sent, copy.deepcopy(sent))) == []


# --- what a cluster shows ----------------------------------------------------------------------------------------


def pod(node: int = 0, phase: str = "Pending", **status: Any) -> dict[str, Any]:
    labels = {"unitrain.dev/job": "gpt-1", "unitrain.dev/node": str(node)}
    meta = {"name": f"gpt-1-{node}-abcde", "labels": labels, "creationTimestamp": "2026-11-20T15:00:00Z"}
    spec = {"containers": [{"name": "node", "image": "x:1"}]}
    return {"metadata": meta, "spec": spec, "status": {"phase": phase, **status}}


def held(reason: str, message: str) -> dict[str, Any]:
    return {"containerStatuses": [{"image": "x:1", "state": {"waiting": {"reason": reason, "message": message}}}]}


def unplaced(message: str) -> dict[str, Any]:
    return {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]}


def warning(name: str, reason: str, message: str) -> dict[str, Any]:
    return {"type": "Warning", "involvedObject": {"name": name}, "reason": reason, "message": message}


def job(**more: Any) -> dict[str, Any]:
    meta = {"name": "gpt-1-0", "namespace": "team-a", "labels": {"unitrain.dev/job": "gpt-1"}}
    return {"metadata": meta, "spec": {}, "status": {}, **more}


QUOTA = (
    'Error creating: pods "gpt-1-0-5kl2p" is forbidden: exceeded quota: small, requested: memory=1Gi, used: '
    "memory=0, limited: memory=512Mi"
)


@pytest.mark.parametrize(
    ("jobs", "pods", "events", "sentence", "mends"),
    [
        ([], [pod(**held("ErrImageNeverPull", "not present"))], [], "node 0 cannot get image 'x:1'", False),
        ([], [pod(**held("ImagePullBackOff", "Back-off")), pod(1, **held("ImagePullBackOff", "Back-off"))], [],
         "nodes 0, 1 cannot get image", False),
        ([], [pod(**held("CreateContainerConfigError", 'secret "hf" not found'))], [], 'secret "hf" not found', False),
        ([], [pod(**unplaced('persistentvolumeclaim "runs" not found'))], [], "PersistentVolumeClaim 'runs'", False),
        ([], [pod(**unplaced("0/1 nodes are available: 1 Insufficient cpu."))], [], "Insufficient cpu", True),
        ([], [pod()], [warning("gpt-1-0-abcde", "FailedMount", "no such volume")], "cannot mount a volume", False),
        ([job()], [], [warning("gpt-1-0", "FailedCreate", QUOTA)], "the quota of namespace 'team-a'", False),
        ([job()], [], [warning("gpt-1-0", "FailedCreate", QUOTA.replace("memory=0", "memory=256Mi"))], "or wait", True),
        ([job()], [], [warning("gpt-1-0", "FailedCreate", 'error looking up service account team-a/t: serviceaccount '
                               '"t" not found')], "no ServiceAccount 't'", False),
        ([job()], [], [warning("gpt-1-0", "FailedCreate", 'violates PodSecurity "restricted"')], "run_as", False),
        ([job(spec={"suspend": True})], [], [], "suspended", True),
    ],
)  # fmt: skip
def test_every_reason_to_wait_is_one_sentence(
    jobs: list[Any], pods: list[Any], events: list[Any], sentence: str, mends: bool
) -> None:
    (trouble,) = waiting(jobs, pods, events)
    assert sentence in trouble.text
    assert "\n" not in trouble.text
    assert trouble.mends is mends


def test_what_is_another_runs_is_not_told() -> None:
    events = [warning("gpt-1-other", "FailedCreate", QUOTA), warning("gpt-10", "FailedCreate", QUOTA)]
    assert waiting([job()], [pod(phase="Running")], events) == []


def test_a_refusal_that_is_over_is_not_told() -> None:
    assert waiting([job()], [pod(phase="Running")], [warning("gpt-1-0", "FailedCreate", QUOTA)]) == []


def test_pods_are_counted_by_what_they_do() -> None:
    older = pod(phase="Failed")
    older["metadata"]["creationTimestamp"] = "2026-11-20T14:00:00Z"
    assert phases([pod(phase="Running"), older, pod(1)]) == "pods: 1 pending, 1 running"
    assert phases([]) == "no pods yet"


@pytest.mark.parametrize(
    ("labels", "annotations", "node"),
    [
        ({"unitrain.dev/node": "3"}, {}, 3),
        ({}, {"batch.kubernetes.io/job-completion-index": "2"}, 2),
        ({"training.kubeflow.org/replica-type": "master", "training.kubeflow.org/replica-index": "0"}, {}, 0),
        ({"training.kubeflow.org/replica-type": "worker", "training.kubeflow.org/replica-index": "0"}, {}, 1),
    ],
)
def test_a_pod_knows_its_node_whatever_made_it(labels: Any, annotations: Any, node: int) -> None:
    assert node_of({"metadata": {"labels": labels, "annotations": annotations}}) == node


def test_a_job_has_ended_when_all_are_done_or_one_has_failed() -> None:
    done = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    failed = {"status": {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]}}
    assert ended([]) is None
    assert ended([done, job()]) is None
    assert ended([done, done]) == (True, "")
    assert ended([job(), failed]) == (False, "BackoffLimitExceeded")


def test_the_last_words_are_the_error_or_what_killed_it() -> None:
    def over(**terminated: Any) -> dict[str, Any]:
        return pod(phase="Failed", containerStatuses=[{"state": {"terminated": terminated}}])

    assert last_words(over(exitCode=70, message="Traceback\nValueError: row 3\n")) == "ValueError: row 3"
    assert "more memory than its limit" in last_words(over(exitCode=137, reason="OOMKilled"))
    assert last_words(over(exitCode=0, message="done")) == ""


# --- files in pods -----------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A ConfigMap as Kubernetes mounts it: links to files in a folder that is changed at once."""
    folder = tmp_path / "etc"
    (folder / "..2026").mkdir(parents=True)
    (folder / "..data").symlink_to("..2026")
    for name, text in (("recipe.yaml", "trainer: mine:Mine\n"), ("job.json", '{"options": {"join_seconds": 1}}')):
        (folder / "..2026" / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")
    return folder


def test_node_0_places_the_files_once_for_each_submission(source: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert unpack.place(source, run_dir, "gpt-1") is None
    assert sorted(path.name for path in run_dir.iterdir()) == ["events.jsonl", "job.json", "placed.json", "recipe.yaml"]
    write_record(run_dir / EXIT, exit_code=75)
    (run_dir / "recipe.yaml").write_text("changed: by hand\n")
    assert unpack.place(source, run_dir, "gpt-1") is None
    assert (run_dir / "recipe.yaml").read_text() == "changed: by hand\n"
    assert unpack.place(source, run_dir, "gpt-1-r1") is None
    assert (run_dir / "recipe.yaml").read_text() == "trainer: mine:Mine\n"
    assert (run_dir / "recipe-1.yaml").read_text() == "changed: by hand\n"
    assert not (run_dir / EXIT).exists(), "how an older submission ended says nothing of this one"


@pytest.mark.parametrize("code", [0, 78, 93])
def test_a_run_that_has_ended_for_good_is_not_started_again(source: Path, tmp_path: Path, code: int) -> None:
    run_dir = tmp_path / "run"
    unpack.place(source, run_dir, "gpt-1")
    write_record(run_dir / EXIT, exit_code=code)
    words = [str(source), str(run_dir), "--job", "gpt-1", "--meet", "gpt-1-0.gpt-1:29500"]
    assert [unpack.main([*words, "--node", str(node)]) for node in range(2)] == [code, code]


def test_other_nodes_wait_for_the_files_of_their_own_submission(source: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    unpack.place(source, run_dir, "gpt-1")
    assert unpack.wait_for_first(source, run_dir, "gpt-1", "gpt-1-0.gpt-1:29500") is None
    with pytest.raises(UnitrainError, match=r"node 0 of gpt-1-r1 has left nothing in .* for 1 s"):
        unpack.wait_for_first(source, run_dir, "gpt-1-r1", "gpt-1-0.gpt-1:29500")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_an_address_in_the_folder_counts_once_somebody_answers_there(
    source: Path, tmp_path: Path, listener: socket.socket
) -> None:
    run_dir, port = tmp_path / "run", listener.getsockname()[1]
    unpack.place(source, run_dir, "gpt-1")
    placed = read_record(run_dir / unpack.PLACED)
    assert placed is not None
    write_record(run_dir / unpack.PLACED, **{**placed, "host": "127.0.0.1"})
    assert unpack.wait_for_first(source, run_dir, "gpt-1", f"shared:{port}") is None
    listener.close()
    with pytest.raises(UnitrainError, match="has not started"):
        unpack.wait_for_first(source, run_dir, "gpt-1", f"shared:{port}")


# --- state -------------------------------------------------------------------------------------------------------


def test_a_damaged_state_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no job was started"):
        State.read(tmp_path)
    write_record(tmp_path / "job-state.json", launcher="kubernetes", job_id="a/b")
    with pytest.raises(UserError, match="is damaged"):
        State.read(tmp_path)


def test_every_option_is_in_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    for name, option in OWN.items():
        assert f"| `{name}` | {option.help} |" in page


def test_manifests_are_plain_yaml() -> None:
    text = Kubernetes().render(Job(run_id="a", run_dir=Path("/x/a"), nodes=2, nproc=1, options=BASE)).files[MANIFEST]
    assert list(yaml.safe_load_all(text)) == from_text(text)
    assert text.startswith("apiVersion: v1\n")
