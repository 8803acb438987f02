"""What all tests share: one thread a rank, no inherited rank, and how long drills last."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

# Before torch is imported: several ranks share few cores, and results are bitwise equal only at a fixed thread count.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from unitrain.world import STARTERS

_DRILL_SECONDS = 7200  # a hundred kills take their time on a busy machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--drills", action="store_true", help="run drills at their full counts, as `make drills` does")


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


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """A test that asks for `full_drills` is a drill; one that needs a GPU is skipped where there is none."""
    needy = []
    for item in items:
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
