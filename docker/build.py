"""Build images with the configuration that pip has on this machine: `python docker/build.py torch jax`.

What a plain `docker build` cannot know is put together here: pip's indexes and certificates become secrets of the
build, and wheels that only this machine has are copied into docker/wheels. `--dry-run` prints the commands instead.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "docker" / "wheels"
FAMILIES = ("torch", "deepspeed", "horovod", "ray", "jax", "tensorflow")
BUILDKIT = {"DOCKER_BUILDKIT": "1"}  # the builder of older docker knows no secrets
CARRIED = ("index-url", "extra-index-url", "trusted-host", "timeout", "retries", "proxy")


def main() -> int:
    """Build one image after the other; the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="+", choices=("base", *FAMILIES), metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--base", metavar="IMAGE", help="the image to build on; else the Dockerfile's")
    parser.add_argument("--extras", metavar="NAMES", help="extras of the package, for every image")
    parser.add_argument("--name", default="unitrain", help="of the images, which are tagged by family (%(default)s)")
    parser.add_argument("--network", metavar="MODE", help="for the build, such as host")
    parser.add_argument("--docker", default="docker", metavar="COMMAND", help="docker or podman (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and the wheels, build nothing")
    known = parser.parse_args()
    settings = pip_settings(subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True))
    wheels = local_wheels(settings) if set(known.families) != {"base"} else []
    with tempfile.TemporaryDirectory() as folder:
        secrets = write_secrets(settings, Path(folder))
        commands = [command(family, known, secrets) for family in known.families]
        for wheel in wheels:
            print(f"wheel {wheel}", flush=True)
            if not known.dry_run and not (WHEELS / wheel.name).exists():
                shutil.copy(wheel, WHEELS)
        for words in commands:
            print(shlex.join(words), flush=True)
            if not known.dry_run and (code := subprocess.run(words, env={**os.environ, **BUILDKIT}).returncode):
                return code
    return 0


def command(family: str, known: argparse.Namespace, secrets: Mapping[str, Path]) -> list[str]:
    """The command that builds one image."""
    words = [*shlex.split(known.docker), "build", "--file", str(ROOT / "docker" / "Dockerfile"), "--target", family]
    words += ["--tag", f"{known.name}:{family}"]
    if known.base:
        words += ["--build-arg", f"BASE_IMAGE={known.base}"]
    if known.extras is not None:
        words += ["--build-arg", f"EXTRAS={known.extras}"]
    if known.network:
        words += ["--network", known.network]
    for name, path in secrets.items():
        words += ["--secret", f"id={name},src={path}"]
    return [*words, str(ROOT)]


def pip_settings(listing: str) -> dict[str, str]:
    """pip's settings from `pip config list`, where later files and then the environment go before earlier ones."""
    settings: dict[str, str] = {}
    rows = [row for row in map(_row, listing.splitlines()) if row is not None]
    for _, key, value in sorted(rows, key=lambda row: row[0] == ":env:"):
        settings[key] = value
    return settings


def write_secrets(settings: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """The files that the build is handed: what of pip's settings means something in a container, and certificates."""
    lines = []
    for key in CARRIED:
        words = [word for word in settings.get(key, "").split() if not word.startswith("file:")]
        if words:
            lines.append(f"{key} = {' '.join(words)}")
    found = {}
    if lines:
        found["pip.conf"] = folder / "pip.conf"
        found["pip.conf"].write_text("\n".join(["[global]", *lines, ""]))
        found["pip.conf"].chmod(0o600)
    if certificates := settings.get("cert"):
        found["ca.crt"] = Path(certificates)
    return found


def local_wheels(settings: Mapping[str, str]) -> list[Path]:
    """Wheels in the folders where pip looks beside its indexes."""
    folders = [Path(word.removeprefix("file://")) for word in settings.get("find-links", "").split()]
    return sorted(path for folder in folders if folder.is_dir() for path in folder.glob("*.whl"))


def _row(line: str) -> tuple[str, str, str] | None:
    """Where a setting is from, its key and its value, of a line such as `global.index-url='...'`."""
    found = re.fullmatch(r"(:env:|[\w-]+)\.([\w-]+)=(['\"].*['\"])", line)
    if found is None:
        return None
    return found[1], found[2].replace("default-timeout", "timeout"), str(ast.literal_eval(found[3]))


if __name__ == "__main__":
    sys.exit(main())
