"""Jobs on a real Ray: nodes train one curve, and whatever is killed of them, the run loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unitrain.agent.records import read_record
from unitrain.audit import audit
from unitrain.launcher import Job
from unitrain.launchers._kubernetes_yaml import from_text
from unitrain.launchers._ray_jobs import ENDED, Jobs
from unitrain.launchers.kubernetes import MANIFEST, Kubernetes
from unitrain.recipe_file import recipe_from_text, to_yaml
from unitrain.run import Run

from ..lab.machine import processes
from ..lab.ray_system import Cluster
from .runs import COMMAND, ROWS, Ended, difference, events, fit, launch, losses, metrics, trainer, unitrain

STEPS = 60
SLOW = [trainer("Slower"), f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=7", "checkpoint.async=false"]
SHORT = ["train.steps=6", "train.eval_every=0"]
SECONDS = 120  # for what takes a few on a quiet machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[float]:
    """The losses of two ranks of this machine, undisturbed."""
    launch(ROWS, folder / "whole", "ddp-2", *SLOW).succeeded()
    return losses(folder / "whole")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head, and two nodes with a CPU each."""
    with Cluster(nodes=2) as found:
        yield found


class Launched:
    """A run whose launch is followed by another process."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        strategy: str = "ddp",
        nodes: str = "2",
        cluster: Cluster | None,
        **options: Any,
    ) -> None:
        self.folder, self.cluster = folder, cluster
        self.environ = os.environ | {"OMP_NUM_THREADS": "1"}
        if cluster is not None:
            self.environ |= cluster.environ
            options = {"address": cluster.address, "environment": ["OMP_NUM_THREADS"], "rejoin_seconds": 40, **options}
        recipe = folder.with_name(f"{folder.name}.yaml")
        recipe.write_text(ROWS)
        given = [*(f"launcher.options.{key}={json.dumps(value)}" for key, value in options.items()), *overrides]
        shape = ["--strategy", strategy, "--launcher", "ray", "--nodes", nodes, "--nproc", "1"]
        self._start("launch", recipe, *shape, "--run-dir", folder, *given)

    def _start(self, *words: str | Path) -> None:
        self.output = self.folder.with_name(f"{self.folder.name}.out")
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [COMMAND, *words], cwd=self.folder.parent, env=self.environ, stdout=output, stderr=output
            )

    def resume(self) -> Launched:
        """Go on after its end."""
        self._start("resume", self.folder)
        return self

    def after(self, step: int, *, starts: int = 1) -> Launched:
        """Once that many starts have begun and the step is done."""
        deadline = time.monotonic() + SECONDS
        while len(events(self.folder, "start")) < starts or self.step < step:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"step {self.step} and never step {step}\n{self.said}"
            time.sleep(0.02)
        return self

    @property
    def step(self) -> int:
        records = metrics(self.folder)
        return int(records[-1]["step"]) if records else 0

    @property
    def said(self) -> str:
        agents = [path.read_text() for path in sorted((self.folder / "logs").glob("agent-*.log"))]
        return "\n".join([self.output.read_text(), *agents])

    def agent(self, node: int) -> dict[str, Any]:
        """The record of a node's agent."""
        found = read_record(self.folder / (f"agent-{node}.json" if node else "agent.json"))
        assert found is not None
        return found

    def actor(self, node: int) -> int:
        """The process of the Ray actor that holds a node."""
        stat = Path(f"/proc/{self.agent(node)['process']['pid']}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[1])

    def home(self, node: int) -> str:
        """On which node of the cluster a node of the run is."""
        assert self.cluster is not None
        pid = self.agent(node)["process"]["pid"]
        return next(name for name in self.cluster.names if pid in self.cluster.pids(name))

    def ended(self, code: int = 0) -> Launched:
        """With that exit code, and nothing is left of it."""
        try:
            self.process.wait(2 * SECONDS)
        finally:
            self.process.kill()
        assert self.process.returncode == code, self.said
        deadline = time.monotonic() + 10
        while left := processes(self.folder):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        return self


@pytest.fixture
def start(folder: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def make(name: str, *overrides: str, **shape: Any) -> Launched:
            made = Launched(folder / name, *overrides, **shape)
            stack.callback(made.process.kill)
            return made

        yield make


# --- in a cluster --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nodes_learn_what_one_machine_learns_to_the_last_bit(
    cluster: Cluster, folder: Path, start: Any, strategy: str
) -> None:
    run = start(f"two-{strategy}", *SHORT, strategy=strategy, cluster=cluster).ended()
    launch(ROWS, folder / f"local-{strategy}", f"{strategy}-2", *SHORT).succeeded()
    assert losses(run.folder) == losses(folder / f"local-{strategy}")


def test_a_run_survives_its_ranks_its_agents_and_its_actors(cluster: Cluster, start: Any, whole: list[float]) -> None:
    run = start("killed", *SLOW, cluster=cluster).after(5)
    os.kill(run.agent(1)["ranks"]["1"], signal.SIGKILL)
    run.after(15, starts=2)
    os.kill(run.actor(1), signal.SIGKILL)
    run.after(25, starts=3)
    os.kill(run.actor(0), signal.SIGKILL)
    run.after(35, starts=4)
    os.kill(run.agent(0)["process"]["pid"], signal.SIGKILL)
    run.ended()
    assert losses(run.folder) == whole
    assert [event["node"] for event in events(run.folder, "host_lost")] == [1, 0]
    assert audit(Run(run.folder)).problems == []


def test_a_lost_node_is_replaced_by_another(cluster: Cluster, start: Any, whole: list[float]) -> None:
    run = start("node", *SLOW, cluster=cluster).after(10)
    cluster.lose(run.home(1))
    cluster.add()
    run.ended()
    assert losses(run.folder) == whole
    assert len({event["host"] for event in events(run.folder, "host_lost")}) == 1
    assert audit(Run(run.folder)).problems == []


def test_a_run_goes_on_with_fewer_nodes_where_the_first_is_lost_and_with_all_when_there_is_another(
    cluster: Cluster, folder: Path, start: Any
) -> None:
    steady = [*SLOW, "train.steps=160", "schedule={name: constant}"]
    run = start("fewer", *steady, cluster=cluster, nodes="1:2", rejoin_seconds=2).after(10)
    cluster.lose(run.home(0))
    run.after(25, starts=2)
    cluster.add()
    run.ended()
    assert [event["world_size"] for event in events(run.folder, "start")] == [2, 1, 2]
    assert audit(Run(run.folder)).problems == []
    fit(ROWS, folder / "steady", *SLOW, "schedule={name: constant}", trainer("Rows"))
    assert difference(losses(run.folder)[:STEPS], losses(folder / "steady")) < 1e-5


def test_a_stopped_run_has_saved_and_is_resumed(cluster: Cluster, start: Any, whole: list[float]) -> None:
    """Also by those who know Ray alone; its own stop leaves a job three seconds."""
    run = start("stopped", *SLOW, cluster=cluster).after(10)
    unitrain("cancel", run.folder, "--grace", "20", cwd=run.folder.parent, **cluster.environ).succeeded()
    run.ended(75)
    assert "unitrain resume" in run.said
    run.resume().after(30, starts=2)
    state = read_record(run.folder / "job-state.json")
    assert state is not None
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environ.items():
            patch.setenv(name, value)
        Jobs(cluster.address).stop(state["job_id"])
    run.ended(75)
    run.resume().ended()
    assert losses(run.folder) == whole


def test_what_a_cluster_cannot_give_is_said_in_one_message(cluster: Cluster, folder: Path, start: Any) -> None:
    run = start("room", cluster=cluster, nodes="3", placement="STRICT_SPREAD", wait_seconds=1)
    run.ended(70)
    (line,) = [line for line in run.output.read_text().splitlines() if "no room" in line]
    assert "3 x {CPU: 1} (STRICT_SPREAD) within 1 s" in line
    assert "CPU: 1" in line.partition("it has ")[2]
    assert "launcher.options.wait_seconds" in line


def test_a_driver_that_cannot_start_or_is_killed_is_explained(cluster: Cluster, start: Any) -> None:
    run = start("python", cluster=cluster, python="/nowhere/python").ended(70)
    assert "the cluster has no Python /nowhere/python" in run.said
    run = start("driver", *SLOW, cluster=cluster).after(10)
    (driver,) = [int(line.partition(":")[0]) for line in processes(run.folder) if "_ray_driver" in line]
    os.kill(driver, signal.SIGKILL)
    run.ended(70)  # and no rank is left
    assert "its driver was ended by SIGKILL" in run.said


def test_a_cluster_that_is_none_or_wants_another_token_is_named(cluster: Cluster, folder: Path) -> None:
    def refused(name: str, address: str, **environ: str) -> Ended:
        (folder / f"{name}.yaml").write_text(ROWS)
        words = ["launch", f"{name}.yaml", "--launcher", "ray", f"launcher.options.address={address}"]
        ended = unitrain(*words, "--run-dir", folder / name, cwd=folder, **environ)
        assert ended.code == 78
        assert "Traceback" not in ended.err
        return ended

    assert "wants another token" in refused("token", cluster.address, RAY_AUTH_TOKEN="0" * 64).last_line
    assert "does not answer" in refused("nowhere", "http://127.0.0.1:9").last_line


def test_the_entrypoint_of_a_rayjob_trains_in_the_cluster_that_it_is_given(cluster: Cluster, folder: Path) -> None:
    """As KubeRay would submit it, but for where the ConfigMap is mounted."""
    run_dir, mounted = folder / "rayjob", folder / "configmap"
    volume = {"host_path": str(folder)}
    options = {"kind": "rayjob", "image": "unitrain:1", "volume": volume, "python": sys.executable, "workdir": "/tmp"}
    recipe = to_yaml(recipe_from_text(ROWS, overrides=["strategy={name: ddp}", *SHORT]))
    job = Job(run_id="rayjob", run_dir=run_dir, nodes=2, nproc=1, options=options, recipe=recipe)
    objects = from_text(Kubernetes().render(job).files[MANIFEST])
    mounted.mkdir()
    for name, content in objects[0]["data"].items():
        (mounted / name).write_text(content)
    entrypoint = objects[-1]["spec"]["entrypoint"].replace("/etc/unitrain", str(mounted))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environ.items():
            patch.setenv(name, value)
        jobs = Jobs(cluster.address)
        for _ in range(2):  # the second time it finds that all is done
            job_id = jobs.submit("rayjob", entrypoint=entrypoint, variables={"OMP_NUM_THREADS": "1"}, run="rayjob")
            deadline = time.monotonic() + SECONDS
            while (seen := jobs.look(job_id)) is not None and seen["status"] not in ENDED:
                assert time.monotonic() < deadline, seen
                time.sleep(0.3)
            assert seen is not None and seen["status"] == "SUCCEEDED", seen
    assert len(losses(run_dir)) == 6
    assert len(events(run_dir, "start")) == 1
    stop = objects[-1]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["lifecycle"]
    subprocess.run(stop["preStop"]["exec"]["command"], timeout=20, check=True)  # of a run that has ended


# --- on a private Ray ----------------------------------------------------------------------------------------------


def test_a_private_ray_survives_a_killed_actor_and_ends_with_its_run(start: Any, whole: list[float]) -> None:
    """Two nodes of the run on the one of its Ray. It is interrupted, too: its ranks save, and nothing is left."""
    run = start("private", *SLOW, cluster=None).after(10)
    rays = ray_processes(run.process.pid)
    os.kill(run.actor(1), signal.SIGKILL)
    run.after(20, starts=2)
    run.process.send_signal(signal.SIGINT)
    run.ended(75)
    assert len(rays) >= 3
    assert [pid for pid in rays if Path(f"/proc/{pid}").exists()] == []
    run.resume().ended()
    assert losses(run.folder) == whole


def ray_processes(launcher: int) -> list[int]:
    """Those below a process that are Ray's."""
    parents, found = dict[int, int](), {launcher}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {launcher})
