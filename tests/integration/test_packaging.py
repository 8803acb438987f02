"""What a user installs: the wheel is whole, `import unitrain` is light, and the versions agree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from unitrain import registry

ROOT = Path(__file__).resolve().parents[2]
APART = {"vllm"}  # brings a torch of its own, so that no environment of ours can have it
SOURCES = ("unitrain", "strategies", "launchers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel that is built from a copy of the sources, without fetching anything."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=_links_and_caches)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(out), str(copy)], check=True)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def _links_and_caches(folder: str, names: list[str]) -> list[str]:
    """Not copied: the links are there for type checkers and editors, and a wheel must not need them."""
    return [name for name in names if name == "__pycache__" or Path(folder, name).is_symlink()]


def test_the_wheel_holds_every_module(wheel: set[str]) -> None:
    wanted = set()
    for top in SOURCES:
        for path in (ROOT / top).rglob("*.py"):
            inside = path.relative_to(ROOT)
            if inside.parts[:2] not in (("unitrain", "strategies"), ("unitrain", "launchers")):
                wanted.add(str(inside if top == "unitrain" else Path("unitrain", inside)))
    assert sorted(wanted - wheel) == [], "list the package under [tool.setuptools] in pyproject.toml"
    assert "unitrain/py.typed" in wheel


def test_the_wheel_holds_every_registered_name_and_the_licence(wheel: set[str]) -> None:
    for group in (registry.STRATEGIES, registry.LAUNCHERS, registry.MODELS, registry.SOURCES):
        for name, entry in group.items():
            module = entry.path.partition(":")[0]
            assert module.replace(".", "/") + ".py" in wheel, f"{name!r} is said to live at {entry.path}"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    assert {name.partition("/")[0].partition("-")[0] for name in wheel} == {"unitrain"}
    assert not [name for name in wheel if "__pycache__" in name]


def test_importing_unitrain_loads_no_framework_and_little_else() -> None:
    program = "import sys; before = set(sys.modules); import unitrain; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "unitrain" in found
    heavy = {"torch", "jax", "tensorflow", "numpy", "omegaconf", "yaml", "typer", "rich", "fsspec", "safetensors"}
    assert not heavy & set(found)
    assert [name for name in found if name.startswith("unitrain.")] == []
    assert len(found) < 20, found


def test_constraints_pin_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {pin.name.lower(): pin for pin in map(Requirement, (line for line in lines if line and line[0] != "#"))}
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in APART}
    asked = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    for requirement in map(Requirement, asked):
        if requirement.name != "unitrain":
            pin = pins.get(requirement.name.lower().replace("-", "_"), pins.get(requirement.name.lower()))
            assert pin is not None, f"constraints.txt does not pin {requirement.name}"
            (version,) = (clause.version for clause in pin.specifier)
            assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def test_all_and_dev_reach_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"]) - {"all", "dev", *APART}
    (everything,) = map(Requirement, project["optional-dependencies"]["all"])
    assert everything.extras == extras
    for group in (registry.STRATEGIES, registry.LAUNCHERS, registry.MODELS, registry.SOURCES):
        assert {entry.extra for entry in group.values()} - {""} <= extras
