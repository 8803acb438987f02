"""Jobs of a real Slurm: several nodes train one curve, and whatever Slurm does to a job, its run loses nothing."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unitrain.audit import audit
from unitrain.cursor import sample_ids
from unitrain.run import Run

from ..lab.slurm_system import Cluster, processes
from .runs import ROWS, TRAINERS, Ended, difference, events, launch, losses, metrics, samples, unitrain
from .test_recovery import redone
from .trainers import NUM_ROWS

OURS = TRAINERS.with_name("slurm_trainers.py")
GPT = Path(__file__).resolve().parents[2] / "recipes" / "gpt_tiny.yaml"
SHORT = ["train.steps=4", "train.log_every=1", "train.eval_every=0", "checkpoint.every=null", "schedule.warmup_steps=2"]
PACED = ROWS.replace(f"{TRAINERS}:Rows", f"{OURS}:Paced")
EVERY = 20
SECONDS = 120  # for what takes a few on a quiet machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes; what has ended is forgotten at once, and nobody keeps accounts."""
    with Cluster(nodes=3, min_job_age=2) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


def slurm(cluster: Cluster, *words: str | Path, cwd: Path) -> Ended:
    """The command, on a login node of the cluster."""
    return unitrain(*words, cwd=cwd, **cluster.environ)


class Submitted:
    """A run that was submitted and is not waited for."""

    def __init__(self, cluster: Cluster, folder: Path, recipe: str, *words: str) -> None:
        self.cluster, self.folder = cluster, folder
        path = folder.with_name(f"{folder.name}.yaml")
        path.write_text(recipe)
        asked = ["launch", path, "--launcher", "slurm", "--run-dir", folder, "--detach", "--json", *words]
        self.job = json.loads(slurm(cluster, *asked, cwd=folder.parent).succeeded().out)["job_id"]

    def after(self, step: int, *, starts: int = 1) -> Submitted:
        """Once that many starts have begun and the step is done."""
        deadline = time.monotonic() + SECONDS
        while len(events(self.folder, "start")) < starts or self.step < step:
            state = self.status()["state"]
            assert state in ("pending", "running"), self.log
            assert time.monotonic() < deadline, f"step {self.step}, {state}, and never step {step}\n{self.log}"
            time.sleep(0.1)
        return self

    @property
    def step(self) -> int:
        records = metrics(self.folder)
        return int(records[-1]["step"]) if records else 0

    @property
    def log(self) -> str:
        """What the script and the agents have said."""
        path = self.folder / f"slurm-{self.job}.log"
        return path.read_text(errors="replace") if path.exists() else "no log"

    def status(self) -> dict[str, Any]:
        told = slurm(self.cluster, "status", self.folder, "--json", cwd=self.folder.parent).succeeded()
        found: dict[str, Any] = json.loads(told.out)
        return found

    def ended(self) -> dict[str, Any]:
        """How it ended, and that nothing of it is left."""
        deadline = time.monotonic() + 2 * SECONDS
        while (status := self.status())["state"] in ("pending", "running"):
            assert time.monotonic() < deadline, f"{status}\n{self.log}"
            time.sleep(0.3)
        assert processes(self.folder) == []
        return status


# --- training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """The curve of four ranks on this machine."""
    launch(GPT.read_text(), folder / "alone", "fsdp2-4", *SHORT).succeeded()
    return losses(folder / "alone")


@pytest.mark.parametrize(
    ("strategy", "tolerance"),
    [("fsdp2", 1e-6), ("zero2", 1e-5), ("horovod", 1e-5), ("jax", 1e-4)],
)
def test_two_nodes_learn_what_one_machine_learns(
    cluster: Cluster, folder: Path, alone: list[float], strategy: str, tolerance: float, request: pytest.FixtureRequest
) -> None:
    if strategy != "fsdp2" and not request.config.getoption("--drills"):
        pytest.skip("not run: one strategy shows it; `make drills` runs the others")
    pytest.importorskip({"zero2": "deepspeed"}.get(strategy, strategy if strategy != "fsdp2" else "torch"))
    run = folder / f"two-nodes-{strategy}"
    shape = ["--launcher", "slurm", "--nodes", "2", "--nproc", "2", "--strategy", strategy]
    ended = slurm(cluster, "launch", GPT, *shape, "--run-dir", run, *SHORT, cwd=folder).succeeded()
    assert "step 4/4" in ended.out, "rank 0 is heard where it was launched"
    assert difference(losses(run), alone) < tolerance
    (start,) = events(run, "start")
    assert start["world_size"] == 4
    assert len(list(run.glob("logs/attempt-0/rank-*.log"))) == 4
    assert audit(Run(run)).problems == []


def test_ranks_see_their_node_its_gpus_and_what_setup_says(cluster: Cluster, folder: Path) -> None:
    (folder / "env.sh").write_text("export SITE=here\n")
    asked = ["gpus_per_node=2", "cpus_per_task=4", "setup=env.sh", "partition=high"]
    options = [f"launcher.options.{option}" for option in asked]
    run = Submitted(cluster, folder / "where", ROWS, "--nodes", "2", "--nproc", "2", f"trainer={OURS}:Where", *options)
    assert run.ended()["state"] == "done"
    told = [(run.folder / "logs" / "attempt-0" / f"rank-{rank}.log").read_text() for rank in range(4)]
    assert [line.split()[0] for line in told] == ["slurm1", "slurm1", "slurm2", "slurm2"]
    for rank, line in enumerate(told):
        wanted = {
            "CUDA_VISIBLE_DEVICES": "0,1",
            "SLURM_CPUS_PER_TASK": "4",
            "SITE": "here",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
        }
        assert all(repr(name) + ": " + repr(value) in line for name, value in wanted.items()), line
        assert str(folder) in line


# --- what Slurm does to jobs -------------------------------------------------------------------------------------


class Disturbed:
    """A long run on two nodes, and the ways in which Slurm ends one of its starts."""

    def __init__(self, cluster: Cluster, folder: Path, steps: int) -> None:
        folder.mkdir()
        (folder / "pace").write_text("0.1")
        words = [f"train.steps={steps}", "train.eval_every=0", f"checkpoint.every={EVERY}", "checkpoint.async=false"]
        options = ["time=60", "warn_seconds=60"]
        shape = ["--strategy", "ddp", "--nodes", "2", "--nproc", "1"]
        self.run = Submitted(
            cluster, folder, PACED, *shape, *words, *(f"launcher.options.{option}" for option in options)
        )
        self.cluster, self.restarts = cluster, 0

    def preempt(self) -> None:
        """A job of a higher tier takes all nodes for a moment."""
        script = "#!/bin/bash\nsleep 1\n"
        path = self.run.folder.parent / "high.sh"
        path.write_text(script)
        self.cluster("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", str(path))

    def reach_the_limit(self) -> None:
        """The warning is due at once, a minute ahead of a limit of one minute; Slurm looks twice a minute."""
        (self.run.folder / "pace").write_text("1")
        self.cluster("scontrol", "update", f"jobid={self.run.job}", "timelimit=1")

    def requeue(self) -> None:
        """As an administrator does."""
        self.cluster("scontrol", "requeue", self.run.job)

    def fail_a_node(self) -> None:
        """The first one, where the batch script runs, or the other."""
        name = random.choice(self.nodes)
        self.cluster("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def crash_a_node(self) -> None:
        """Nobody is told: Slurm finds out for itself."""
        name = random.choice(self.nodes)
        self.cluster.lose(name)
        self.lost = name

    @property
    def nodes(self) -> list[str]:
        found = self.cluster.facts(self.run.job)["NodeList"]
        return self.cluster("scontrol", "show", "hostnames", found).split()

    def disturb(self, how: str) -> None:
        """End this start in that way, and wait for the next."""
        self.lost = ""
        (self.run.folder / "pace").write_text("0.1")
        getattr(self, how)()
        self.restarts += 1
        self.cluster.wait_for(self.run.job, Restarts=str(self.restarts), JobState="PENDING")
        self.cluster("scontrol", "update", f"jobid={self.run.job}", "timelimit=60")
        if self.lost:
            self.cluster.boot(self.lost)
        self.cluster.wait_for(self.run.job, JobState="RUNNING", Restarts=str(self.restarts))


SIGNALS = ("preempt", "reach_the_limit", "requeue")


def test_a_run_goes_on_whatever_ends_its_starts(cluster: Cluster, folder: Path, full_drills: bool) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"drawn with seed {seed}")
    random.seed(seed)
    hows = ["preempt", "reach_the_limit", "fail_a_node"]
    if full_drills:
        hows = [*hows * 4, *["requeue"] * 5, *["crash_a_node"] * 3]
        random.shuffle(hows)
    steps = 60 * len(hows) + 40
    disturbed = Disturbed(cluster, folder / "disturbed", steps)
    run = disturbed.run
    lost = []
    for number, how in enumerate(hows):
        if full_drills and random.random() < 0.3:
            cluster.wait_for(run.job, JobState="RUNNING")
            time.sleep(random.uniform(0, 3))  # while it starts, perhaps
        else:
            run.after(run.step + random.randrange(2, 20), starts=len(events(run.folder, "start")) or 1)
        before = len(redone(run.folder))
        print(f"{number}: {how} at step {run.step}", flush=True)
        disturbed.disturb(how)
        run.after(0, starts=len(events(run.folder, "start")))
        lost.append((how, redone(run.folder)[before:]))
    (run.folder / "pace").unlink()
    status = run.ended()
    print(lost, redone(run.folder))
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, steps), run.log
    # One successor each: the controller counts the starts of the one job that there is.
    assert run.log.count("unitrain: job ") == len(hows) + 1
    assert len(events(run.folder, "start")) <= len(hows) + 1
    failures = sum(how not in SIGNALS for how in hows)
    assert len(redone(run.folder)) <= failures, "a signal loses no step"
    assert max([0, *redone(run.folder)]) <= EVERY
    assert audit(Run(run.folder)).problems == []
    assert samples(run.folder) == [sample_ids(0, step, 10, NUM_ROWS["train"]).tolist() for step in range(steps)]
    launch(PACED, folder / "undisturbed", "ddp-2", f"train.steps={steps}", "train.eval_every=0").succeeded()
    assert losses(run.folder) == losses(folder / "undisturbed")


def test_a_node_that_is_lost_unnoticed_ends_this_start_and_not_the_run(cluster: Cluster, folder: Path) -> None:
    """The agents of the others notice first."""
    (folder / "lost").mkdir()
    (folder / "lost" / "pace").write_text("0.1")
    words = ["train.steps=60", "train.eval_every=0", "checkpoint.every=5", "launcher.options.rejoin_seconds=1"]
    shape = ["--strategy", "ddp", "--nodes", "2", "--nproc", "1"]
    run = Submitted(cluster, folder / "lost", PACED, *shape, *words).after(10)
    for pid in processes(run.folder):
        words_of = pid.partition(": ")[2].replace("\0", " ")
        if "unitrain.agent" in words_of and "--node 1" in words_of and "srun" not in words_of:
            cluster("kill", "-KILL", pid.partition(":")[0])
    cluster.wait_for(run.job, Restarts="1")
    (run.folder / "pace").unlink()
    assert run.ended()["state"] == "done", run.log
    assert "did not come within 1 s" in run.log
    assert audit(Run(run.folder)).problems == []


# --- ends --------------------------------------------------------------------------------------------------------


def test_a_cancelled_run_has_saved_and_leaves_nothing(cluster: Cluster, folder: Path) -> None:
    (folder / "cancelled").mkdir()
    (folder / "cancelled" / "pace").write_text("0.1")
    shape = ["--strategy", "ddp", "--nodes", "2", "--nproc", "1", "train.steps=500", "train.eval_every=0"]
    run = Submitted(cluster, folder / "cancelled", PACED, *shape).after(5)
    told = slurm(cluster, "cancel", run.folder, "--grace", "30", cwd=folder).succeeded()
    assert f"cancelled: cancelled; go on with `unitrain resume {run.folder}`" in told.out
    status = run.ended()
    assert (status["state"], status["exit_code"], status["detail"]) == ("cancelled", 75, "stopped after a save")
    assert status["checkpoint"] == status["step"] >= 5
    assert cluster("squeue", "--noheader", f"--name={run.folder.name}") == ""
    refused = slurm(cluster, "cancel", run.folder, cwd=folder)
    assert (refused.code, refused.last_line) == (78, "error: cancelled is not running (cancelled): nothing to cancel")
    (run.folder / "pace").unlink()
    slurm(cluster, "resume", run.folder, "train.steps=40", "--nodes", "1", cwd=folder).succeeded()
    assert [record["step"] for record in metrics(run.folder)] == list(range(1, 41))
    assert run.status()["state"] == "done"


def test_a_run_that_waits_is_told_why_and_can_be_cancelled(cluster: Cluster, folder: Path) -> None:
    run = Submitted(cluster, folder / "waits", ROWS, "--nodes", "4", "train.global_batch=40")
    deadline = time.monotonic() + SECONDS
    while "PartitionNodeLimit" not in (status := run.status())["detail"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert status["state"] == "pending"
    assert status["detail"] == "PartitionNodeLimit: the partition has not so many nodes: it will not start"
    slurm(cluster, "cancel", run.folder, cwd=folder).succeeded()
    assert run.ended()["state"] == "cancelled"


def test_scancel_by_hand_ends_the_run(cluster: Cluster, folder: Path) -> None:
    (folder / "by-hand").mkdir()
    (folder / "by-hand" / "pace").write_text("0.1")
    run = Submitted(cluster, folder / "by-hand", PACED, "--strategy", "single", "train.steps=500").after(3)
    cluster("scancel", run.job)
    status = run.ended()
    assert status["state"] in ("cancelled", "preempted"), "once Slurm has forgotten it, the agents' word is left"
    assert status["checkpoint"] == status["step"]
    assert "it cannot be requeued" not in run.log


def test_a_failed_run_says_why_and_stays_ended(cluster: Cluster, folder: Path) -> None:
    shape = ["--launcher", "slurm", "--nodes", "2", "--nproc", "1", "--strategy", "ddp", "--run-dir", folder / "fails"]
    (folder / "fails.yaml").write_text(ROWS.replace(":Rows", ":Failing"))
    asked = ["launch", folder / "fails.yaml", *shape, "recovery.restarts=0"]
    ended = slurm(cluster, *asked, cwd=folder)
    assert (ended.code, ended.last_line) == (70, "RuntimeError: this step fails")
    assert f"what its agents said: {folder / 'fails' / 'slurm-'}" in ended.err
    time.sleep(3)  # Slurm forgets it
    told = slurm(cluster, "status", folder / "fails", "--json", cwd=folder).succeeded()
    assert json.loads(told.out)["state"] == "failed"
    assert len(events(folder / "fails", "start")) == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("partition=nowhere", "error: sbatch refuses the job: invalid partition specified: nowhere; "),
        ("gres=tpu:1", "error: sbatch refuses the job: Invalid generic resource (gres) specification"),
        ("setup=no.sh", "error: launcher.options.setup is 'no.sh', and there is no such file in "),
    ],
)
def test_what_slurm_refuses_is_one_message(cluster: Cluster, folder: Path, option: str, said: str) -> None:
    (folder / "refused.yaml").write_text(ROWS)
    asked = ["launch", folder / "refused.yaml", "--launcher", "slurm", f"launcher.options.{option}"]
    refused = slurm(cluster, *asked, "--run-dir", folder / f"refused-{option.partition('=')[0]}", cwd=folder)
    assert refused.code == 78
    assert refused.last_line.startswith(said), refused.err
    assert "Traceback" not in refused.err


def test_sbatch_reads_the_directives_as_they_are_meant(cluster: Cluster, folder: Path) -> None:
    (folder / "two words").mkdir()
    run = Submitted(
        cluster,
        folder / "two words" / "directives",
        ROWS,
        "train.steps=2",
        *(f"launcher.options.{option}" for option in (
            "comment='lr = 3 # or 4'", "time='0:30:00'", "mem='1G'", "mail_type=NONE", "directives=[--nice=3]",
            "exclude=slurm3", "warn_seconds=60",
        )),
    )  # fmt: skip
    facts = cluster.facts(run.job)
    assert run.ended()["state"] == "done"
    wanted = {"TimeLimit": "00:30:00", "MinMemoryNode": "1G", "Nice": "3", "ExcNodeList": "slurm3", "Requeue": "1"}
    assert {name: facts.get(name) for name in wanted} == wanted
    assert "slurm-" in "".join(path.name for path in run.folder.glob("slurm-*.log"))


# --- sweeps ------------------------------------------------------------------------------------------------------


def test_a_sweep_is_one_job_array_and_a_run_for_each_value(cluster: Cluster, folder: Path) -> None:
    (folder / "rows.yaml").write_text(ROWS)
    asked = ["launch", folder / "rows.yaml", "--launcher", "slurm", "--run-dir", folder / "sweep", "train.steps=3"]
    swept = slurm(cluster, *asked, "--sweep", "optimizer.lr=1e-2,3e-2,1e-1", "--json", cwd=folder).succeeded()
    runs = json.loads(swept.out)
    array = runs[0]["job_id"].partition("_")[0]
    assert [run["job_id"] for run in runs] == [f"{array}_{number}" for number in range(3)]
    deadline = time.monotonic() + SECONDS
    for run, rate in zip(runs, (1e-2, 3e-2, 1e-1), strict=True):
        path = Path(run["folder"])
        while True:
            told = json.loads(slurm(cluster, "status", path, "--json", cwd=folder).succeeded().out)
            if told["state"] not in ("pending", "running"):
                break
            assert time.monotonic() < deadline, told
            time.sleep(0.3)
        assert (told["state"], told["job_id"]) == ("done", run["job_id"])
        assert max(record["lr"] for record in metrics(path)) == pytest.approx(rate)
    assert len({losses(Path(run["folder"]))[-1] for run in runs}) == 3


def test_a_sweep_runs_in_turn_where_there_is_no_array(folder: Path) -> None:
    (folder / "rows.yaml").write_text(ROWS)
    asked = ["launch", folder / "rows.yaml", "--run-dir", folder / "turns", "train.steps=2", "--strategy", "single"]
    ended = unitrain(*asked, "--sweep", "optimizer.lr=1e-2,1e-1", cwd=folder).succeeded()
    assert ended.out.count("# optimizer.lr=") == 2
    assert [len(losses(folder / f"turns-{number}")) for number in range(2)] == [2, 2]


# --- accounts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def accounted(cluster: Cluster) -> Iterator[Cluster]:
    """Another cluster, whose accounts know what its controller forgets at once; the first one rests meanwhile."""
    cluster.__exit__(None, None, None)
    try:
        with Cluster(nodes=1, min_job_age=2, accounting="yes") as found:
            yield found
    finally:
        cluster.__enter__()


def test_accounts_tell_how_a_job_ended_that_slurm_has_forgotten(accounted: Cluster, folder: Path) -> None:
    shape = ["--strategy", "single", "train.steps=2"]
    done = Submitted(accounted, folder / "accounted", ROWS, *shape)
    (folder / "stopped").mkdir()
    (folder / "stopped" / "pace").write_text("0.1")
    stopped = Submitted(accounted, folder / "stopped", PACED, *shape, "train.steps=500").after(3)
    accounted("scancel", stopped.job)
    assert done.ended()["state"] == "done"
    assert stopped.ended()["state"] == "cancelled"
    deadline = time.monotonic() + SECONDS
    while accounted.facts(stopped.job):
        assert time.monotonic() < deadline, "Slurm never forgets it"
        time.sleep(0.5)
    (done.folder / "exit.json").unlink()  # as where the agents could not write it any more
    assert (done.status()["state"], done.status()["exit_code"]) == ("done", 0)
    status = stopped.status()
    assert (status["state"], status["exit_code"], status["detail"]) == ("cancelled", 75, "stopped after a save")
