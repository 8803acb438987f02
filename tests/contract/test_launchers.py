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
from unitrain.errors import RecipeError
from unitrain.trainer import Trainer

class Mine(Trainer):
    def fit(self):
        rank = self.world.rank
        print(f"rank {rank} of {self.world.size} is up", flush=True)
        self.work(rank)
        return SimpleNamespace(exit_code=0)

    def work(self, rank):
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
        ("local", {"nodes": 2}, "launcher.nodes is 2", "--launcher torchrun"),
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
    assert launcher(name).problems(recipe(name, nproc=2)) == []


# --- jobs --------------------------------------------------------------------------------------------------------


class Started:
    """A job of two ranks that a launcher has started here."""

    def __init__(self, name: str, work: str, folder: Path) -> None:
        (folder / "mine.py").write_text(TRAINER + textwrap.indent(textwrap.dedent(work), " " * 8))
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        (self.run_dir / "recipe.yaml").write_text("trainer: mine:Mine\n")
        self.name, self.launcher = name, launcher(name)
        preload = ("unitrain.worker", "unitrain.trainer", "unitrain.recipe_file")
        self.job = Job(run_id="run", run_dir=self.run_dir, nodes=1, nproc=2, preload=preload)
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
        out, _ = self.elsewhere("print(json.dumps(dataclasses.asdict(l.status(run, id))))").communicate(timeout=20)
        values: dict[str, Any] = json.loads(out)
        return values

    def pids(self) -> list[int]:
        """Of all processes whose command line names the run's folder, and their sessions' members."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(self.run_dir).encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue  # it has ended meanwhile
        return [pid for pid in found if pid != os.getpid()]


@pytest.fixture(params=list(registry.LAUNCHERS))
def start(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    started: list[Started] = []

    def make(work: str) -> Started:
        started.append(Started(request.param, work, tmp_path))
        return started[-1]

    yield make
    for job in started:
        job.launcher.cancel(job.run_dir, job.id, grace_seconds=5)
        job.launcher.wait(job.job, job.id)
        assert job.pids() == [], "a process outlives the job"


def test_a_job_is_followed_from_another_process_to_its_end(start: Any, capfd: pytest.CaptureFixture[str]) -> None:
    job = start(
        """
        while not Path("go").exists():
            time.sleep(0.01)
        print("now I go")
        """
    )
    for path, content in job.rendered.files.items():
        assert (job.run_dir / path).read_text() == content
    command = Path(f"/proc/{job.id}/cmdline")
    while not (words := command.read_bytes().decode().split("\0")[:-1]):
        time.sleep(0.01)  # the kernel shows it a moment after the process has begun
    assert words == list(job.rendered.argv)
    assert job.status()["state"] == "running"
    follower = job.elsewhere("for line in l.logs(run, rank=1, follow=True): print(line)")
    assert follower.stdout.readline() == "rank 1 of 2 is up\n"
    Path("go").touch()
    assert job.launcher.wait(job.job, job.id) == 0
    assert follower.communicate(timeout=20)[0] == "now I go\n"
    assert job.status() == {"state": "done", "exit_code": 0, "detail": ""}
    assert list(job.launcher.logs(job.run_dir, rank=1)) == ["rank 1 of 2 is up", "now I go"]
    assert "rank 0 of 2 is up" in capfd.readouterr().out, "rank 0 is heard where the job was started"
    with pytest.raises(UserError, match="no log of rank 7; ranks with logs: 0, 1"):
        job.launcher.logs(job.run_dir, rank=7)
    with pytest.raises(UserError, match="has no job 'other'"):
        job.launcher.status(job.run_dir, "other")


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
    assert job.launcher.wait(job.job, job.id) == code
    err = capfd.readouterr().err
    assert err.rstrip().splitlines()[-1] == last
    status = job.status()
    assert (status["state"], status["exit_code"]) == ("failed", code)
    assert status["detail"] == last


def test_a_job_is_cancelled_from_another_process(start: Any) -> None:
    job = start("time.sleep(60)")
    for rank in range(2):
        assert next(job.launcher.logs(job.run_dir, rank=rank, follow=True)) == f"rank {rank} of 2 is up"
    canceller = job.elsewhere("l.cancel(run, id, grace_seconds=10)")
    code = job.launcher.wait(job.job, job.id)
    canceller.communicate(timeout=20)
    assert canceller.returncode == 0
    assert code == 143
    assert job.status() == {"state": "cancelled", "exit_code": 143, "detail": "stopped by SIGTERM"}
    assert job.pids() == []
