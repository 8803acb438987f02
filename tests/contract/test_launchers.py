"""What every launcher must do: render purely, run precisely that, and be asked about its job from any shell."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unitrain import registry
from unitrain.errors import UserError
from unitrain.launcher import Job, Launcher, Rendered
from unitrain.recipe import LauncherRecipe, Recipe

from .systems import WAYS, System, options_of, system_of

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "launchers"
RECORD = "UNITRAIN_RECORD"  # set it to 1 to write the recorded files anew, and look at the difference

JOB = {"run_id": "gpt-1", "run_dir": Path("/runs/gpt-1"), "preload": ("torch", "unitrain.trainer")}
CASES = {
    "local": Job(nodes=1, nproc=2, **JOB),
    "local-spawned": Job(nodes=1, nproc=4, fork=False, options={"grace_seconds": 20, "detached": True}, **JOB),
    "torchrun": Job(nodes=1, nproc=2, **JOB),
    "torchrun-restarts": Job(nodes=1, nproc=8, options={"max_restarts": 3, "local_addr": None}, **JOB),
    "torchrun-elastic": Job(nodes=4, nproc=8, options={"rdzv_endpoint": "node-1:29400", "min_nodes": 1}, **JOB),
    "torchrun-nodes": Job(nodes=2, nproc=8, options={"rdzv_endpoint": "node-1:29400"}, **JOB),
    "torchrun-static": Job(nodes=2, nproc=8, options={"master_addr": "node-1", "node_rank": 1}, **JOB),
}

TRAINER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from unitrain.agent.records import append_event
from unitrain.errors import RecipeError
from unitrain.trainer import Trainer

class Mine(Trainer):
    def fit(self):
        rank = self.world.rank
        print(f"rank {rank} of {self.world.size} is up", flush=True)
        return SimpleNamespace(exit_code=self.work(rank, Path(__file__).parent) or 0)

    def work(self, rank, here):
"""


# As on a machine that only submits: neither a framework nor a launcher's own library can be imported.
NOTHING_INSTALLED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "torch", "jax", "jaxlib", "flax", "optax", "tensorflow", "keras", "deepspeed", "horovod", "ray",
            "accelerate", "transformers", "kubernetes", "mpi4py",
        }:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from unitrain.cli import main
main()
"""


def launcher(name: str) -> Launcher:
    made: Launcher = registry.load("launchers", name)()
    return made


def recipe(name: str, **shape: Any) -> Recipe:
    return Recipe(trainer="mine:Mine", launcher=LauncherRecipe(name=name, **shape))


# --- values ------------------------------------------------------------------------------------------------------


def as_text(rendered: Rendered) -> str:
    """The files and the command line, readable in a diff and the same on every machine."""
    files = [f"--- {path}\n{content}" for path, content in rendered.files.items()]
    environ = [f"{name}={value}" for name, value in rendered.environ.items()]
    command = shlex.join(["python" if word == sys.executable else word for word in rendered.argv])
    return "\n".join(
        [*files, "--- command", *environ, command.replace(" --", " \\\n  --").replace(" -m", " \\\n  -m"), ""]
    )


@pytest.mark.fast
@pytest.mark.parametrize("case", CASES)
def test_a_rendering_is_the_recorded_one(case: str) -> None:
    text = as_text(launcher(case.partition("-")[0]).render(CASES[case]))
    path = RECORDED / f"{case}.txt"
    if os.environ.get(RECORD):
        path.write_text(text)
    assert text == path.read_text(), f"if that is meant, record it with {RECORD}=1"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "shape", "what", "instead"),
    [
        ("local", {"nodes": 2}, "launcher.nodes is 2", "--launcher ssh, slurm"),
        ("local", {"options": {"grace": 3}}, "no option 'grace'", "grace_seconds"),
        ("torchrun", {"nodes": 2}, "where 2 nodes meet", "rdzv_endpoint=HOST:PORT"),
        ("torchrun", {"options": {"min_nodes": 2}}, "min_nodes is 2", "from 1 to 1"),
        ("torchrun", {"options": {"nnodes": 2}}, "launcher.nodes", "set launcher.nodes"),
        ("torchrun", {"options": {"detached": True}}, "no option 'detached'", "--launcher local"),
    ],
)
def test_a_refusal_comes_with_an_alternative(name: str, shape: dict[str, Any], what: str, instead: str) -> None:
    (problem,) = launcher(name).problems(recipe(name, **shape))
    assert what in problem.what
    assert instead in problem.instead


@pytest.mark.fast
@pytest.mark.parametrize("name", registry.LAUNCHERS)
def test_two_ranks_on_one_node_are_no_problem(name: str) -> None:
    assert launcher(name).problems(recipe(name, nproc=2, options=options_of(name, 1))) == []


@pytest.mark.fast
@pytest.mark.parametrize("name", registry.LAUNCHERS)
def test_an_unknown_option_is_refused_with_what_there_is(name: str) -> None:
    if registry.LAUNCHERS[name].starter != "agent":
        pytest.skip("not run: its options are another program's")
    problems = launcher(name).problems(recipe(name, options={**options_of(name, 1), "grace_second": 3}))
    (problem,) = [problem for problem in problems if "grace_second" in problem.what]
    assert "grace_seconds" in problem.what + problem.instead


@pytest.mark.fast
@pytest.mark.parametrize("name", registry.LAUNCHERS)
def test_the_same_job_is_rendered_the_same(name: str) -> None:
    job = Job(nodes=1, nproc=2, options=options_of(name, 1), **JOB)
    assert launcher(name).render(job) == launcher(name).render(job)


@pytest.mark.parametrize("name", registry.LAUNCHERS)
def test_a_dry_run_prints_the_files_where_nothing_is_installed(name: str, tmp_path: Path) -> None:
    """The recipe asks for a strategy and a number of nodes that this machine could not give either."""
    nodes = 1 if name == "local" else 2
    shape = {"name": name, "nodes": nodes, "nproc": 1, "options": options_of(name, nodes)}
    text = {"trainer": "mine.py:Mine", "strategy": {"name": "zero2"}, "launcher": shape}
    (tmp_path / "recipe.yaml").write_text(json.dumps(text))
    (tmp_path / "mine.py").write_text("import torch")
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", NOTHING_INSTALLED, "launch", "recipe.yaml", "--dry-run", "--run-dir", "out"]
    told = [_output([*command, *more], tmp_path) for more in ([], ["--json"])]
    found = json.loads(told[1])
    assert found["launcher"] == name
    assert found["argv"] or found["files"]
    for path, content in found["files"].items():
        assert Path(path).is_relative_to(tmp_path / "out")
        assert f"# file {Path(path).relative_to(tmp_path)}\n{content.rstrip()}\n" in told[0]
    assert shlex.join(found["argv"]) in told[0]
    assert found["recipe"]["strategy"]["name"] == "zero2"
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be left behind"


def _output(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- jobs --------------------------------------------------------------------------------------------------------


class Started:
    """A job that a launcher has started on its system."""

    def __init__(self, name: str, system: System, work: str, folder: Path) -> None:
        self.name, self.system, self.folder = name, system, folder
        self.run_dir = prepare(work, folder, system)
        self.launcher = launcher(name)
        preload = ("unitrain.worker", "unitrain.trainer", "unitrain.recipe_file")
        shape = {"nodes": system.nodes, "nproc": system.nproc, "options": system.options}
        self.size = system.nodes * system.nproc
        recipe = (self.run_dir / "recipe.yaml").read_text()
        self.job = Job(run_id="run", run_dir=self.run_dir, recipe=recipe, preload=preload, **shape)
        self.rendered = self.launcher.render(self.job)
        self.id = self.launcher.submit(self.job, self.rendered)

    def elsewhere(self, expression: str) -> subprocess.Popen[str]:
        """Another process, which prints what the launcher answers; `l`, `run` and `id` are ours."""
        source = f"""
            import dataclasses, json
            from pathlib import Path
            from unitrain import registry
            l, run, id = registry.load("launchers", {self.name!r})(), Path({str(self.run_dir)!r}), {self.id!r}
            {expression}
        """
        command = [sys.executable, "-u", "-c", textwrap.dedent(source)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def status(self) -> dict[str, Any]:
        """As another process sees it."""
        asked = self.elsewhere("print(json.dumps(dataclasses.asdict(l.status(run, id))))")
        out, _ = asked.communicate(timeout=self.system.patience_seconds)
        values: dict[str, Any] = json.loads(out)
        return values

    def wait(self) -> int:
        """Until it ends, however long."""
        return self.launcher.wait(self.job, self.id)

    def first_line(self, rank: int) -> str:
        """What a rank prints first, once it does."""
        return next(self.launcher.logs(self.run_dir, rank=rank, follow=True))


def prepare(work: str, folder: Path, system: System) -> Path:
    """A Trainer that does this work, and a run's folder with a recipe for it."""
    (folder / "mine.py").write_text(TRAINER + textwrap.indent(textwrap.dedent(work), " " * 8))
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(f"trainer: {folder / 'mine.py'}:Mine\n")
    return run_dir


@pytest.fixture(scope="module", params=[*registry.LAUNCHERS, *WAYS])
def named_system(request: pytest.FixtureRequest) -> Iterator[tuple[str, System]]:
    """A launcher and its system, which stays up for all tests of this file."""
    with system_of(request.param) as system:
        yield request.param.partition("-")[0], system


@pytest.fixture
def place(named_system: tuple[str, System], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the nodes share, and the variables of whoever submits."""
    _, system = named_system
    for name, value in system.environ.items():
        monkeypatch.setenv(name, value)
    folder = system.folder(tmp_path)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def start(named_system: tuple[str, System], place: Path) -> Iterator[Any]:
    name, system = named_system
    started: list[Started] = []

    def make(work: str) -> Started:
        started.append(Started(name, system, work, place))
        return started[-1]

    yield make
    for job in started:
        job.launcher.cancel(job.run_dir, job.id, grace_seconds=5)
        job.wait()
        assert system.left(job.run_dir) == [], "something outlives the job"


def test_a_job_is_followed_from_another_process_to_its_end(start: Any, capfd: pytest.CaptureFixture[str]) -> None:
    job = start(
        """
        while not (here / "go").exists():
            time.sleep(0.01)
        print("now I go")
        """
    )
    for path, content in job.rendered.files.items():
        assert (job.run_dir / path).read_text() == content
    last, size = job.size - 1, job.size
    if job.system.process:
        assert command_of(job.id) == list(job.rendered.argv)
    follower = job.elsewhere(f"for line in l.logs(run, rank={last}, follow=True): print(line)")
    assert follower.stdout.readline() == f"rank {last} of {size} is up\n"
    assert job.status()["state"] == "running"
    (job.folder / "go").touch()
    assert job.wait() == 0
    assert follower.communicate(timeout=job.system.patience_seconds)[0] == "now I go\n"
    assert job.status() == {"state": "done", "exit_code": 0, "detail": ""}
    for rank in range(size):
        assert list(job.launcher.logs(job.run_dir, rank=rank)) == [f"rank {rank} of {size} is up", "now I go"]
    assert f"rank 0 of {size} is up" in capfd.readouterr().out, "rank 0 is heard where the job is waited for"
    known = ", ".join(map(str, range(size)))
    with pytest.raises(UserError, match=f"no log of rank 77; ranks with logs: {known}"):
        job.launcher.logs(job.run_dir, rank=77)
    with pytest.raises(UserError, match="has no job 'other'"):
        job.launcher.status(job.run_dir, "other")


def command_of(pid: str) -> list[str]:
    """Its words; the kernel shows them a moment after the process has begun."""
    while True:
        if words := Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]:
            return words


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        ("ValueError('row 3 is not finite')", 70, "ValueError: row 3 is not finite"),
        ("RecipeError('train.steps is -1')", 78, "train.steps is -1"),
    ],
    ids=["error", "user mistake"],
)
def test_a_failed_job_ends_with_the_first_failing_ranks_error(
    start: Any, capfd: pytest.CaptureFixture[str], error: str, code: int, last: str
) -> None:
    job = start(f"if rank == 1: raise {error}\ntime.sleep(60)")
    assert job.wait() == code
    err = capfd.readouterr().err
    assert err.rstrip().splitlines()[-1] == last
    status = job.status()
    assert (status["state"], status["exit_code"]) == ("failed", code)
    assert status["detail"] == last


def test_a_job_whose_ranks_have_saved_and_left_may_be_started_again(start: Any) -> None:
    job = start(
        """
        if rank == 0:
            append_event(here / "run", "preempt", exit_code=75)  # as a Trainer does
            (here / "saved").touch()
        while not (here / "saved").exists():
            time.sleep(0.01)
        return 75
        """
    )
    assert job.wait() == 75
    status = job.status()
    assert (status["state"], status["exit_code"]) == ("preempted", 75)


def test_a_job_is_cancelled_from_another_process(start: Any) -> None:
    job = start("time.sleep(60)")
    for rank in range(job.size):
        assert job.first_line(rank) == f"rank {rank} of {job.size} is up"
    canceller = job.elsewhere("l.cancel(run, id, grace_seconds=10)")
    code = job.wait()
    canceller.communicate(timeout=job.system.patience_seconds)
    assert canceller.returncode == 0
    assert code == 143
    status = job.status()
    assert (status["state"], status["exit_code"]) == ("cancelled", 143)
    assert job.system.left(job.run_dir) == []
    job.launcher.cancel(job.run_dir, job.id, grace_seconds=1)
    assert job.status() == status, "what has ended stays as it is"


def test_a_run_is_launched_watched_and_resumed_by_the_command_line(
    named_system: tuple[str, System], place: Path
) -> None:
    """Each command is a shell of its own, and the first returns before the run has ended."""
    name, system = named_system
    if not system.detaches:
        pytest.skip("not run: its jobs end with whoever starts them")
    run_dir = prepare("print('attempt', self.world.rank)", place, system)
    (place / "recipe.yaml").write_bytes((run_dir / "recipe.yaml").read_bytes())
    (run_dir / "recipe.yaml").unlink()
    given = {"name": name, "nodes": system.nodes, "nproc": system.nproc, "options": dict(system.options)}
    launch = ["launch", "recipe.yaml", "--run-dir", str(run_dir), f"launcher={json.dumps(given)}"]
    launched = json.loads(unitrain(*launch, "--detach", "--json", cwd=place))
    assert launched["folder"] == str(run_dir)
    assert launched["launcher"] == name
    for attempt in range(2):
        lines = unitrain("logs", str(run_dir), "--rank", "1", "--follow", "--json", cwd=place).splitlines()
        assert [json.loads(line)["line"] for line in lines][-1] == "attempt 1"
        assert _ended(run_dir, place, system) == {"state": "done", "exit_code": 0}
        if attempt == 0:
            assert unitrain("resume", str(run_dir), "--detach", cwd=place) == f"{run_dir}\n"
    assert len(list((run_dir / "logs").glob("attempt-*"))) == 2
    assert system.left(run_dir) == []


def _ended(run_dir: Path, place: Path, system: System) -> dict[str, Any]:
    """How the run ended, by the command line."""
    deadline = time.monotonic() + system.patience_seconds
    while True:
        facts = json.loads(unitrain("status", str(run_dir), "--json", cwd=place))
        if facts["state"] not in ("pending", "running") or time.monotonic() > deadline:
            return {"state": facts["state"], "exit_code": facts["exit_code"]}
        time.sleep(0.2)


def unitrain(*words: str, cwd: Path) -> str:
    """What the command prints."""
    done = subprocess.run(
        [Path(sys.executable).with_name("unitrain"), *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
