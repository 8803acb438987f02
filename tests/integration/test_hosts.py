"""Runs over several hosts by ssh, torchrun and mpirun: hosts of their own addresses and names, on one machine.

Ranks are killed, hosts lose power and cables are cut; what a run must do then is in docs/ssh.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unitrain.agent.records import EXIT, read_record
from unitrain.audit import audit
from unitrain.run import Run
from unitrain.strategies._torch_refusals import horovod_has_mpi

from ..lab.hosts import CannotRun, Hosts, hosts
from .runs import COMMAND, ROWS, Ended, difference, events, losses, metrics, trainer, unitrain

ROOT = Path(__file__).resolve().parents[2]
GPT = ROOT / "recipes" / "gpt_tiny.yaml"
FEW = ["train.steps=6", "train.eval_every=0", "train.log_every=1", "checkpoint.every=0"]
SLOW = [trainer("Slow"), "train.eval_every=0", "checkpoint.every=7", "checkpoint.async=false"]
SILENCE_SECONDS = 5
PATIENCE_SECONDS = 90


@pytest.fixture(scope="module")
def lab() -> Iterator[Hosts]:
    """h1 and h2, where Python finds this checkout."""
    try:
        with hosts(2, environ={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as up:
            yield up
    except CannotRun as error:
        pytest.skip(f"not run: {error}")


@pytest.fixture(autouse=True)
def _nothing_is_left(lab: Hosts) -> Iterator[None]:
    yield
    left = {name: lab.processes(name) for name in lab.names}
    assert not any(left.values()), left


@pytest.fixture
def drill(full_drills: bool) -> None:
    """Only under `make drills`: these wait for what takes its time."""
    if not full_drills:
        pytest.skip("a drill: make drills")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("hosts")
    (found / "rows.yaml").write_text(ROWS)
    return found


def ssh(lab: Hosts, *, nodes: int = 2, nproc: int = 1, **options: object) -> list[str]:
    """What launches on the hosts; the environment is theirs."""
    names = ",".join(lab.names[:nodes])
    given = {"ssh_config": lab.ssh_config, "silence_seconds": SILENCE_SECONDS, **options}
    return [
        *("--launcher", "ssh", "--nodes", str(nodes), "--nproc", str(nproc), "--strategy", "ddp"),
        f"launcher.options.hosts=[{names}]",
        *(f"launcher.options.{name}={value}" for name, value in given.items()),
    ]


class Going:
    """A run under way, followed by a process of its own."""

    def __init__(self, run: Path, recipe: str | Path, *arguments: str) -> None:
        self.run = run
        self.said = run.with_name(f"{run.name}.out")
        command = [COMMAND, "launch", recipe, "--run-dir", run, *arguments]
        with self.said.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=run.parent, stdout=output, stderr=output, env=os.environ)

    def after(self, step: int, *, attempts: int = 1, seconds: float = PATIENCE_SECONDS) -> Going:
        """As soon as that many attempts have begun and a step is logged."""
        until(lambda: len(events(self.run, "start")) >= attempts and self.step >= step, seconds, self.said)
        return self

    @property
    def step(self) -> int:
        records = metrics(self.run) if self.run.exists() else []
        return int(records[-1]["step"]) if records else 0

    def ended(self, seconds: float = PATIENCE_SECONDS) -> Ended:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it hangs\n{self.said.read_text()[-3000:]}") from None
        return Ended(code, self.said.read_text(), "")


def until(true: Callable[[], bool], seconds: float, said: Path | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, said.read_text()[-3000:] if said else "it never came"
        time.sleep(0.02)


def ranks_on(lab: Hosts, host: str, run: Path, parent: str = "unitrain.agent.warm") -> list[int]:
    """The ranks of a run by their numbers on their host."""
    table = [line.split(None, 2) for line in lab.run(host, "ps", "-eo", "pid=,ppid=,args=").splitlines()]
    warm = [pid for pid, _, words in table if parent in words]
    return [int(pid) for pid, of, words in table if of in warm]


def same_curve(run: Path, other: Path) -> None:
    assert difference(losses(run), losses(other)) < 1e-6


# --- a run -------------------------------------------------------------------------------------------------------


def local(folder: Path, ranks: int) -> Path:
    """The run that others are compared with."""
    run = folder / f"here-{ranks}"
    shape = ["--launcher", "local", "--strategy", "ddp", "--nproc", str(ranks)]
    unitrain("launch", GPT, *shape, "--run-dir", run, *FEW, cwd=folder).succeeded()
    return run


@pytest.fixture(scope="module")
def one_machine(folder: Path) -> Path:
    """Two ranks."""
    return local(folder, 2)


@pytest.mark.parametrize("nproc", [1, 2])
def test_two_hosts_learn_what_one_machine_learns(lab: Hosts, folder: Path, one_machine: Path, nproc: int) -> None:
    here, there = one_machine if nproc == 1 else local(folder, 2 * nproc), folder / f"hosts-{nproc}"
    done = unitrain("launch", GPT, *ssh(lab, nproc=nproc), "--run-dir", there, *FEW, cwd=folder).succeeded()
    assert "step 6/6" in done.out, "rank 0 is heard where the run was launched"
    same_curve(there, here)
    assert read_record(there / EXIT)["exit_code"] == 0  # type: ignore[index]  # it has one
    logs = sorted(path.name for path in (there / "logs" / "attempt-0").glob("rank-*.log"))
    assert logs == [f"rank-{rank}.log" for rank in range(2 * nproc)]


def test_a_rank_killed_on_the_second_host_is_replaced(lab: Hosts, folder: Path) -> None:
    going = Going(folder / "killed", "rows.yaml", *ssh(lab), *SLOW, "train.steps=40").after(10)
    (rank,) = ranks_on(lab, "h2", going.run)
    lab.run("h2", "kill", "-9", str(rank))
    ended = going.ended().succeeded()
    assert "rank 1" in ended.out and "SIGKILL" in ended.out
    assert [event["world_size"] for event in events(going.run, "start")] == [2, 2]
    assert len(losses(going.run)) == 40
    assert audit(Run(going.run)).problems == []


def test_cancel_saves_and_leaves_no_process_on_any_host(lab: Hosts, folder: Path) -> None:
    going = Going(folder / "cancelled", "rows.yaml", *ssh(lab), *SLOW, "train.steps=3000").after(5)
    facts = json.loads(unitrain("status", going.run, "--json", cwd=folder).succeeded().out)
    assert facts["state"] == "running"
    told = unitrain("cancel", going.run, cwd=folder).succeeded()
    assert all(not lab.processes(name) for name in lab.names), "when cancel returns, nothing is left"
    assert "preempted" in told.out
    assert going.ended().code == 75
    assert json.loads(unitrain("status", going.run, "--json", cwd=folder).out)["exit_code"] == 75


def test_agents_end_when_whoever_launched_them_is_killed(lab: Hosts, folder: Path) -> None:
    going = Going(folder / "orphaned", "rows.yaml", *ssh(lab), *SLOW, "train.steps=3000").after(5)
    going.process.kill()
    until(lambda: not any(lab.processes(name) for name in lab.names), 30, going.said)
    until(lambda: (going.run / EXIT).exists(), 5, going.said)
    going.process.wait()
    assert json.loads(unitrain("status", going.run, "--json", cwd=folder).out)["state"] == "preempted"


@pytest.mark.usefixtures("drill")
def test_a_detached_run_is_followed_asked_and_cancelled_from_other_shells(lab: Hosts, folder: Path) -> None:
    run = folder / "detached"
    shape = ssh(lab, detached="true")
    launch = ["launch", "rows.yaml", "--run-dir", run, "--detach", *shape, *SLOW, "train.steps=3000"]
    unitrain(*launch, cwd=folder).succeeded()
    until(lambda: len(metrics(run)) > 3, PATIENCE_SECONDS)
    facts = json.loads(unitrain("status", run, "--json", cwd=folder).succeeded().out)
    assert facts["state"] == "running"
    assert "on h1" in facts["detail"] and "on h2" in facts["detail"]
    follower = subprocess.Popen(
        [COMMAND, "logs", run, "--rank", "1", "--follow"], cwd=folder, stdout=subprocess.DEVNULL
    )
    unitrain("cancel", run, cwd=folder).succeeded()
    assert follower.wait(30) == 0
    assert all(not lab.processes(name) for name in lab.names)
    assert json.loads(unitrain("status", run, "--json", cwd=folder).out)["exit_code"] == 75


TELLS = """
import os, time
from types import SimpleNamespace
from unitrain import Trainer

class Tells(Trainer):
    def fit(self):
        print("letters:", len(os.environ["MY_TOKEN"]), os.environ["NCCL_TEST"], flush=True)
        time.sleep(1)
        return SimpleNamespace(exit_code=0)
"""


def test_values_of_variables_reach_the_ranks_and_no_command_line_or_file(lab: Hosts, folder: Path) -> None:
    secret = "swordfish-0815"
    (folder / "tells.py").write_text(TELLS)
    run = folder / "secret"
    variables = {"MY_TOKEN": secret, "NCCL_TEST": "7"}
    names = ssh(lab, nodes=1, environment="[MY_TOKEN, NCCL_*]")
    tells = [f"trainer={folder / 'tells.py'}:Tells"]
    command = [COMMAND, "launch", "rows.yaml", "--run-dir", run, *names, *tells]
    environ = os.environ | variables
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environ)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("letters:"):
            break
    assert line == f"letters: {len(secret)} 7\n"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert secret.encode() not in path.read_bytes()
        except OSError:
            continue  # it has ended meanwhile
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    written = [path for path in run.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert written == []
    refused = unitrain("launch", "rows.yaml", "--run-dir", folder / "unset", *names, *tells, cwd=folder)
    assert refused.code == 78
    assert "names MY_TOKEN, which is not set here" in refused.last_line


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_h2(lab: Hosts, folder: Path) -> Callable[[str], Path]:
    """A stand-in for Python that does something else on h2."""

    def make(instead: str) -> Path:
        path = folder / "python"
        script = f'#!/bin/sh\n[ "$(hostname)" = h2 ] && {instead}\nexec {shlex.quote(sys.executable)} "$@"\n'
        path.write_text(script)
        path.chmod(0o755)
        return path

    return make


def refused(lab: Hosts, folder: Path, name: str, code: int, *arguments: str) -> str:
    """What is said of a launch that starts nothing, anywhere."""
    run, recipe = folder / name, ROOT / "recipes" / "digits_mlp.yaml"
    began = time.monotonic()
    ended = unitrain("launch", recipe, "--run-dir", run, *arguments, cwd=recipe.parent)
    assert (ended.code, time.monotonic() - began < 40) == (code, True), ended
    assert sorted(path.name for path in (run / "ssh").iterdir()) == [], "no agent was started"
    assert "nothing was started" in ended.err
    facts = json.loads(unitrain("status", run, "--json", cwd=ROOT).out)
    assert (facts["state"], facts["exit_code"]) == ("failed", code)
    return ended.err


def test_a_host_that_cannot_be_reached_is_named_and_nothing_starts(lab: Hosts, folder: Path) -> None:
    lab.cut("h2")
    try:
        said = refused(lab, folder, "unreachable", 70, *ssh(lab, connect_seconds=2))
    finally:
        lab.join("h2")
    assert said.startswith("h2 cannot be reached by ssh: ssh: connect to host")
    assert "h1" not in said


def test_a_host_that_refuses_the_key_is_named(lab: Hosts, folder: Path) -> None:
    asked = [word.replace("[h1,h2]", "[h1,stranger@h2]") for word in ssh(lab)]
    assert refused(lab, folder, "key", 78, *asked).startswith("stranger@h2 refuses the key")


@pytest.mark.parametrize(
    ("instead", "what"),
    [
        ("exec /opt/no/python", "h2 has no such Python"),
        (f'exec {shlex.quote(sys.executable)} -I -S "$@"', "h2 has no unitrain for its Python"),
        ("exec false", "h2 cannot start an agent: exit code 1"),
    ],
    ids=["no Python", "no unitrain", "another failure"],
)
def test_a_host_that_lacks_something_is_named(
    lab: Hosts, folder: Path, on_h2: Callable[[str], Path], instead: str, what: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id.replace(" ", "-")
    assert refused(lab, folder, name, 78, *ssh(lab, python=on_h2(instead))).startswith(what)


def test_a_folder_that_is_not_shared_and_a_place_to_meet_that_is_none_are_refused(lab: Hosts, folder: Path) -> None:
    own = Path("/dev/shm") / folder.name  # each host has its own
    try:
        said = refused(lab, own, "run", 78, *ssh(lab))
    finally:
        shutil.rmtree(own, ignore_errors=True)
    assert "h1 cannot read" in said and "h2 cannot read" in said
    said = refused(lab, folder, "nowhere", 78, *ssh(lab, address="nowhere"))
    assert "h1 does not know nowhere" in said
    said = refused(lab, folder, "taken", 78, *ssh(lab, port=22))
    assert said.startswith("h1 cannot listen at port 22")


# --- faults of hosts and networks --------------------------------------------------------------------------------


def test_a_partition_heals_or_ends_the_run_within_its_deadline(lab: Hosts, folder: Path) -> None:
    options = {"rejoin_seconds": 4, "grace_seconds": 5}
    going = Going(folder / "parted", "rows.yaml", *ssh(lab, **options), *SLOW, "train.steps=3000").after(20)
    lab.part("h1", "h2")
    time.sleep(4)
    lab.heal("h1", "h2")
    going.after(going.step + 20)
    assert len(events(going.run, "start")) == 1, "a short one costs nothing but its time"
    lab.part("h1", "h2")
    try:
        began = time.monotonic()
        ended = going.ended(90)
        seconds = time.monotonic() - began
    finally:
        lab.heal("h1", "h2")
    assert ended.code == 70, ended
    assert seconds < 60
    step = going.step
    unitrain("resume", going.run, f"train.steps={step + 5}", cwd=folder).succeeded()
    assert len(losses(going.run)) == step + 5
    assert audit(Run(going.run)).problems == []


@pytest.mark.usefixtures("drill")
def test_a_host_that_loses_power_and_comes_back_takes_part_again(lab: Hosts, folder: Path) -> None:
    going = Going(folder / "power", "rows.yaml", *ssh(lab), *SLOW, "train.steps=400").after(20)
    lab.crash("h2")
    time.sleep(2)
    lab.boot("h2")
    assert "h2 is back" in going.ended(150).succeeded().out
    assert [event["event"] for event in events(going.run, "host_lost", "host_back")] == ["host_lost", "host_back"]
    assert len(losses(going.run)) == 400
    assert audit(Run(going.run)).problems == []


@pytest.mark.usefixtures("drill")
def test_a_lost_connection_to_another_than_the_first_host_harms_nobody(lab: Hosts, folder: Path) -> None:
    going = Going(folder / "cut-off", "rows.yaml", *ssh(lab), *SLOW, "train.steps=800").after(20)
    lab.part("h2", "")
    try:
        until(lambda: bool(events(going.run, "host_lost")), 30)
        going.after(going.step + 100)
    finally:
        lab.heal("h2", "")
    going.ended().succeeded()
    assert len(events(going.run, "start")) == 1


@pytest.mark.usefixtures("drill")
def test_a_lost_connection_to_the_first_host_stops_the_run_after_a_save(lab: Hosts, folder: Path) -> None:
    going = Going(folder / "first-cut-off", "rows.yaml", *ssh(lab), *SLOW, "train.steps=3000").after(20)
    lab.part("h1", "")
    try:
        ended = going.ended()
    finally:
        lab.heal("h1", "")
    assert ended.code == 75
    assert "the connection to h1 is lost" in ended.out
    assert events(going.run, "checkpoint")[-1]["step"] == going.step


@pytest.mark.usefixtures("drill")
@pytest.mark.parametrize("host", ["h1", "h2"])
def test_a_killed_agent_is_replaced_or_ends_the_run(lab: Hosts, folder: Path, host: str) -> None:
    going = Going(folder / f"agent-{host}", "rows.yaml", *ssh(lab), *SLOW, "train.steps=400").after(20)
    (agent,) = [pid for pid, words in lab.processes(host).items() if "-m unitrain.agent " in words]
    lab.run(host, "kill", "-9", str(agent))
    ended = going.ended()
    if host == "h1":
        assert (ended.code, ended.last_line) == (70, "the agent on h1 ended with exit code 137")
        return
    assert ended.code == 0, ended.out
    assert len(losses(going.run)) == 400


@pytest.mark.usefixtures("drill")
def test_sigterm_to_the_launch_saves_and_ends_all(lab: Hosts, folder: Path) -> None:
    going = Going(folder / "terminated", "rows.yaml", *ssh(lab), *SLOW, "train.steps=3000").after(5)
    going.process.terminate()
    assert going.ended().code == 75
    assert events(going.run, "checkpoint")[-1]["step"] == going.step


# --- torchrun and mpirun -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "meeting", [["rdzv_endpoint=h1:29400"], ["master_addr=h1", "master_port=29501"]], ids=["c10d", "static"]
)
def test_torchrun_trains_on_two_hosts(
    lab: Hosts, folder: Path, one_machine: Path, meeting: list[str], request: pytest.FixtureRequest
) -> None:
    run = folder / f"torchrun-{request.node.callspec.id}"
    shape = ["--launcher", "torchrun", "--nodes", "2", "--nproc", "1", "--strategy", "ddp"]
    options = [f"launcher.options.{option}" for option in meeting]
    command = [str(COMMAND), "launch", str(GPT), "--run-dir", str(run), *shape, *options, *FEW]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        lab.on("h1", *command), cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert first.stderr is not None
    assert first.stderr.readline().startswith("now run on the other host")
    told = first.stderr.readline().strip().replace(" --node-rank N ", " --node-rank 1 ")
    second = subprocess.Popen(lab.on("h2", "sh", "-c", told), cwd="/", env=environ)
    out, err = first.communicate(timeout=PATIENCE_SECONDS)
    assert (first.returncode, second.wait(PATIENCE_SECONDS)) == (0, 0), err
    assert "step 6/6" in out
    same_curve(run, one_machine)


needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))) is None,
    reason="needs mpirun: pip install 'unitrain[mpi]'",
)


def mpi(lab: Hosts) -> list[str]:
    """What launches by mpirun on both hosts."""
    options = {"ssh_config": lab.ssh_config, "environment": "[PYTHONPATH]", "allow_run_as_root": "true"}
    return [
        *("--launcher", "mpi", "--nodes", "2", "--nproc", "1", f"launcher.options.hosts=[{','.join(lab.names)}]"),
        *(f"launcher.options.{name}={value}" for name, value in options.items()),
    ]


@needs_mpirun
@pytest.mark.parametrize("strategy", ["ddp", "horovod"])
def test_mpirun_trains_on_two_hosts(lab: Hosts, folder: Path, one_machine: Path, strategy: str) -> None:
    by_mpi = []
    if strategy == "horovod":
        if importlib.util.find_spec("horovod") is None or not horovod_has_mpi():
            pytest.skip("needs Horovod with MPI: python -m unitrain.build horovod --mpi")
        by_mpi = ["strategy.options.backend=mpi"]
    run = folder / f"mpi-{strategy}"
    command = ["launch", GPT, *mpi(lab), "--strategy", strategy, "--run-dir", run, *FEW, *by_mpi]
    done = unitrain(*command, cwd=folder, PYTHONPATH=str(ROOT)).succeeded()
    assert "step 6/6" in done.out
    same_curve(run, one_machine)


@needs_mpirun
@pytest.mark.usefixtures("drill")
def test_mpirun_saves_when_it_is_cancelled_and_says_the_first_error(lab: Hosts, folder: Path) -> None:
    shape = [*mpi(lab), "--strategy", "ddp"]
    going = Going(folder / "mpi-cancelled", "rows.yaml", *shape, *SLOW, "train.steps=3000").after(5)
    assert "preempted" in unitrain("cancel", going.run, cwd=folder).succeeded().out
    assert going.ended().code == 75
    assert all(not lab.processes(name) for name in lab.names)
    failed = unitrain("launch", "rows.yaml", *shape, trainer("Failing"), "--run-dir", folder / "mpi-failed", cwd=folder)
    assert failed.code == 70
    assert "Error: " in failed.last_line
