"""Two containers on a private network train one run, on a container daemon of the tests' own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unitrain.errors import ExitCode
from unitrain.run import Run

from .runs import Ended, difference, events, fit, losses

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "tests" / "lab"
BASE = "unitrain-lab:bookworm"
CANNOT = 77
BUILD_SECONDS = 1800
STEPS = 12
SETTINGS = (
    *("optimizer.lr=1e-2", "schedule.warmup_steps=3", f"train.steps={STEPS}", "train.global_batch=10"),
    *("train.log_every=1", "train.eval_every=0", "checkpoint.every=6"),
)
SLOW_STEPS = 300
SLOW = (
    "trainer=/src/tests/integration/trainers.py:Slow",
    *SETTINGS,
    f"train.steps={SLOW_STEPS}",
    "checkpoint.every=100",
)


class Docker:
    """The daemon, by its address."""

    def __init__(self, host: str) -> None:
        # Neither the tests' own Python nor another daemon's settings are the commands'.
        own = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER", "PYTHON"))}
        self.environ = {**own, "DOCKER_HOST": host, "PATH": f"/usr/bin:{os.environ['PATH']}"}

    def __call__(self, *words: str | Path) -> str:
        """What a docker command prints."""
        done = subprocess.run(
            ["docker", *words], env=self.environ, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
        )
        assert done.returncode == 0, f"docker {words}: {done.stderr}"
        return done.stdout.strip()

    def build(self, family: str) -> str:
        """Build an image by docker/build.py; its name."""
        build = [sys.executable, ROOT / "docker" / "build.py", family, "--base", BASE, "--network", "host"]
        done = subprocess.run(
            build, env=self.environ, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return f"unitrain:{family}"


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    """A daemon of our own with a base image."""
    folder = Path(tempfile.mkdtemp(prefix="unitrain-", dir="/tmp"))  # not tmp_path: paths of sockets are short
    started = subprocess.run([LAB / "docker_up.sh", folder], capture_output=True, text=True, check=False)
    try:
        if started.returncode == CANNOT:
            pytest.skip(f"not run: {started.stderr.strip().splitlines()[-1]}")
        assert started.returncode == 0, started.stderr
        yield Docker(started.stdout.strip())
    finally:
        subprocess.run([LAB / "docker_down.sh", folder], check=True)


class Bed:
    """The test bed of docker/compose.yaml."""

    def __init__(self, docker: Docker, project: str, image: str, *, mounted: bool) -> None:
        self.docker, self.project = docker, project
        self.environ = {**docker.environ, "COMPOSE_PROJECT_NAME": project, "IMAGE": image, "NPROC": "2"}
        self.files = ["-f", str(ROOT / "docker" / "compose.yaml")]
        if mounted:
            self.files += ["-f", str(LAB / "compose.mounted.yaml")]
            self.environ |= {"SOURCES": str(ROOT), "PACKAGES": sysconfig.get_path("purelib")}

    def compose(self, *words: str, **environ: str) -> Ended:
        """Run docker-compose to its end."""
        done = subprocess.run(
            ["docker-compose", *self.files, *words],
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def start(self, name: str, strategy: str, *overrides: str) -> None:
        """Start both nodes on a run, new or not."""
        settings = {"RUN": name, "STRATEGY": strategy, "OVERRIDES": " ".join(overrides)}
        self.compose("up", "--detach", **settings).succeeded()

    def wait(self) -> list[int]:
        """The exit codes of both nodes."""
        return [int(self.docker("wait", self.container(node))) for node in ("node0", "node1")]

    def container(self, service: str) -> str:
        """The container of a service."""
        return self.compose("ps", "--all", "--quiet", service).succeeded().out.strip()

    def folder(self, name: str) -> Path:
        """A run's folder, as this machine sees the volume."""
        return Path(self.docker("volume", "inspect", "--format", "{{.Mountpoint}}", f"{self.project}_runs")) / name

    def audit(self, name: str) -> str:
        """What `unitrain audit` says of a run, where its Trainer is at hand."""
        command = ("python", "-c", "from unitrain.cli import main; main()", "audit", f"/runs/{name}")
        return self.compose("run", "--rm", "--no-deps", "-T", "node0", *command).succeeded().out

    def said(self) -> str:
        """What the containers printed."""
        return self.compose("logs", "--no-color").out

    def down(self) -> None:
        """Remove the containers, the network and the volume."""
        self.compose("down", "--volumes", "--timeout", "5").succeeded()


@pytest.fixture(scope="module")
def bed(docker: Docker) -> Iterator[Bed]:
    """A bed of images without packages, into which ours are mounted."""
    image = docker.build("base")
    version = docker(
        "run", "--rm", "--network", "none", image, "python", "-c", "import sys; print(*sys.version_info[:2])"
    )
    if version != "{} {}".format(*sys.version_info[:2]):
        pytest.skip(f"not run: packages for this Python do not work with the image's, {version}")
    bed = Bed(docker, "unitrainmounted", image, mounted=True)
    yield bed
    bed.down()


def rows(kind: str, root: Path | str) -> str:
    """The override that names a Trainer of the tests, with the sources at `root`."""
    return f"trainer={root}/tests/integration/trainers.py:{kind}"


def wait_until(happened: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def test_two_containers_learn_what_one_process_learns(bed: Bed, tmp_path: Path) -> None:
    bed.start("learns", "fsdp2", rows("Rows", "/src"), *SETTINGS)
    assert bed.wait() == [0, 0], bed.said()
    recipe = (ROOT / "recipes" / "gpt_tiny.yaml").read_text()
    fit(recipe, tmp_path / "alone", rows("Rows", ROOT), *SETTINGS)
    assert difference(losses(bed.folder("learns")), losses(tmp_path / "alone")) < 1e-5
    logs = sorted(path.name for path in (bed.folder("learns") / "logs").glob("attempt-*/rank-*.log"))
    assert logs == [f"rank-{rank}.log" for rank in range(4)]


def test_a_container_that_is_stopped_saves_the_run_and_it_goes_on(bed: Bed) -> None:
    bed.start("stops", "ddp", *SLOW)
    run_dir = bed.folder("stops")
    wait_until(lambda: len(Run(run_dir).metrics()) >= 5, "five steps")
    began = time.monotonic()
    bed.compose("stop", "node1").succeeded()
    assert bed.wait() == [ExitCode.PREEMPTED, ExitCode.PREEMPTED], bed.said()
    assert time.monotonic() - began < 30
    stopped = len(Run(run_dir).metrics())
    assert 5 <= stopped < SLOW_STEPS
    assert events(run_dir, "checkpoint")[-1]["step"] == stopped
    bed.start("stops", "ddp", *SLOW)
    assert bed.wait() == [0, 0], bed.said()
    assert len(losses(run_dir)) == SLOW_STEPS
    assert "every sample was used exactly once" in bed.audit("stops")


def test_a_container_that_is_killed_comes_back_into_the_run(bed: Bed) -> None:
    bed.start("killed", "ddp", *SLOW)
    run_dir = bed.folder("killed")
    wait_until(lambda: bool(events(run_dir, "checkpoint")), "a checkpoint")
    bed.compose("kill", "node1").succeeded()
    bed.compose("start", "node1").succeeded()
    assert bed.wait() == [0, 0], bed.said()
    assert len(losses(run_dir)) == SLOW_STEPS
    assert "every sample was used exactly once" in bed.audit("killed")


def test_images_hold_all_that_two_containers_train_with(docker: Docker, full_drills: bool) -> None:
    if not full_drills:
        pytest.skip("not run: building images takes minutes; `make drills` does")
    curves = {}
    for family, strategy in (("torch", "fsdp2"), ("jax", "jax")):
        bed = Bed(docker, f"unitrain{family}", docker.build(family), mounted=False)
        bed.start("whole", strategy, "train.steps=5", "train.log_every=1")
        try:
            assert bed.wait() == [0, 0], bed.said()
            curves[family] = losses(bed.folder("whole"))
        finally:
            bed.down()
    assert difference(curves["jax"], curves["torch"]) < 1e-4
