"""Install what an image needs: this package's own requirements and those of the extras that are named, but not itself.

They are read from pyproject.toml beside this file, so that a layer can hold them which no change of a source touches.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).with_name("pyproject.toml")


def main() -> None:
    """Become pip with the requirements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="an extra of the package")
    parser.add_argument("--and", nargs="+", default=[], dest="others", metavar="NAME", help="other packages beside")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="packages to leave out")
    known = parser.parse_args()
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    wanted = [*requirements(project, known.extras), *known.others]
    left = dict.fromkeys(line for line in wanted if name_of(line) not in known.without)
    os.execv(sys.executable, [sys.executable, "-m", "pip", "install", *left])


def requirements(project: Mapping[str, Any], extras: Sequence[str]) -> Iterator[str]:
    """The requirements of the package and of its extras; an extra that names others of its own is followed."""
    yield from project["dependencies"]
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            raise SystemExit(f"no extra {extra!r}; {project['name']} has {', '.join(project['optional-dependencies'])}")
        for line in project["optional-dependencies"][extra]:
            if name_of(line) == project["name"]:
                inner = re.search(r"\[(.*?)\]", line)
                yield from requirements(project, inner[1].split(",") if inner else [])
            else:
                yield line


def name_of(requirement: str) -> str:
    """The package that a requirement asks for."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


if __name__ == "__main__":
    main()
