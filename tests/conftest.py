"""What all tests share: one thread a rank, no inherited rank, and how long drills last."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

# Before torch is imported: several ranks share few cores, and results are bitwise equal only at a fixed thread count.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from _pytest.runner import runtestprotocol

from unitrain.world import STARTERS

CLUSTERS = ("test_slurm.py", "test_kubernetes.py", "test_hosts.py", "test_docker.py", "test_ray_launcher.py")
SYSTEMS = ("slurm", "kubernetes", "ssh", "mpi", "ray")  # launchers whose contract is tested on one
AGAIN: list[str] = []  # tests that were run twice, and why
_DRILL_SECONDS = 7200  # a hundred kills take their time on a busy machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--drills", action="store_true", help="run drills at their full counts, as `make drills` does")


def _on_cluster(item: pytest.Item) -> bool:
    if item.path.name == "test_launchers.py":
        case = item.name.partition("[")[2].rstrip("]").partition("-")[0]
        return case in SYSTEMS and item.get_closest_marker("fast") is None
    return item.path.parent.name == "integration" and item.path.name in CLUSTERS


@pytest.fixture(scope="session")
def full_drills(request: pytest.FixtureRequest) -> bool:
    """True under `make drills`: repeat the fault as often as the promise says, not as often as CI has time for."""
    return bool(request.config.getoption("--drills"))


@pytest.fixture(scope="session", autouse=True)
def _nobodys_rank() -> Iterator[None]:
    """Tests start alone, also in a shell that torchrun, srun or mpirun started."""
    own = ("MASTER_ADDR", "MASTER_PORT", "UNITRAIN_AGENT_FD", "UNITRAIN_HEARTBEAT", "UNITRAIN_STACKS")
    with pytest.MonkeyPatch.context() as patch:
        for name in (*own, *(name for names in STARTERS.values() for name in names.values())):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, or of the size that the test is parametrised with."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = getattr(request, "param", "2m")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not run: no file system can be mounted here ({error})")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """A test on a real cluster fails when it fails twice: schedulers and kubelets have deadlines that we do not set."""
    if item.get_closest_marker("cluster") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if failed := [report for report in reports if report.failed]:
        AGAIN.append(f"{item.nodeid}\n{failed[0].longreprtext}")
        item._initrequest()  # type: ignore[attr-defined]  # as pytest-rerunfailures does
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests on clusters were run twice, and how the first time ended."""
    for text in AGAIN:
        terminalreporter.write_sep("-", "run twice, since it failed the first time")
        terminalreporter.write_line(text)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """A test that asks for `full_drills` is a drill; one that needs a GPU is skipped where there is none."""
    needy = []
    for item in items:
        if _on_cluster(item):
            item.add_marker("cluster")
        if "full_drills" in getattr(item, "fixturenames", ()):
            item.add_marker("drill")
            if item.config.getoption("--drills"):
                item.add_marker(pytest.mark.timeout(_DRILL_SECONDS))
        if item.get_closest_marker("gpu"):
            needy.append(item)
    if needy:
        import torch  # only if a test asks: it takes seconds

        if not torch.cuda.is_available():
            for item in needy:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
