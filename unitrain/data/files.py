"""Which files a path in a recipe means, and which of them are held out for evaluation."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, RecipeError

PYTHON_STDLIB = "python-stdlib"
# Tests are half of the standard library and full of tables; the others differ from machine to machine.
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_NOT_STDLIB_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class TextFile:
    """A file, and its name below the folder that it was found in: the same on every machine."""

    path: Path
    name: str

    def read(self) -> bytes:
        """The whole content. Raises DataError."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path} could not be read: {error.strerror}") from error


def find_files(paths: Sequence[str], pattern: str) -> list[TextFile]:
    """The files that the paths mean, each once, in the order of the paths and then of their names.

    A path is a file, a folder (its files below that fit `pattern`), a glob (`**` for any depth), or
    `python-stdlib`: the modules of the running Python's standard library. Hidden files are left out.
    Raises RecipeError for a path that means no file.
    """
    found: dict[Path, TextFile] = {}
    for path in paths:
        files = _python_stdlib() if path == PYTHON_STDLIB else _below(path, pattern)
        for file in sorted(files, key=lambda file: file.name):
            found.setdefault(file.path.resolve(), file)
    return list(found.values())


def split_files(files: Sequence[TextFile], eval_fraction: float, split: str) -> list[TextFile]:
    """The files of a split, chosen by a hash of their names: a new file moves no other to the other side.

    Takes two files or more. Where the hash leaves a side empty, the file nearest to it goes there.
    """
    shares = {file: _share(file.name) for file in files}
    ranked = sorted(files, key=lambda file: shares[file])
    held_out = {file for file in files if shares[file] < eval_fraction} - {ranked[-1]} | {ranked[0]}
    return [file for file in files if (file in held_out) == (split == "eval")]


def _share(name: str) -> float:
    """A place from 0 to 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _below(path: str, pattern: str) -> list[TextFile]:
    place = Path(path).expanduser()
    if place.is_file():
        return [TextFile(place, place.name)]
    if place.is_dir():
        folder, fits = place, pattern
    elif glob.has_magic(path):
        fixed = next(number for number, part in enumerate(place.parts) if glob.has_magic(part))
        folder, fits = Path(*place.parts[:fixed]), str(Path(*place.parts[fixed:]))
    else:
        raise RecipeError(
            f"data.path names {path!r}, which is no file, folder or glob; correct it, or use {PYTHON_STDLIB!r}, "
            "which is always there"
        )
    files = _glob(folder, fits)
    if not files:
        raise RecipeError(f"data.path names {path!r}, but no file in {str(folder)!r} fits the pattern {fits!r}")
    return files


def _python_stdlib() -> list[TextFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    # Not glob: it would walk through site-packages, which may hold a hundred thousand files.
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB and not name.startswith("config-")]
        below = Path(folder).relative_to(root)
        files += [
            TextFile(Path(folder, name), (below / name).as_posix())
            for name in names
            if name.endswith(".py") and not name.startswith(_NOT_STDLIB_FILES)
        ]
    if not files:
        raise RecipeError(f"this Python keeps no sources in {str(root)!r}; give data.path a folder of text instead")
    return files


def _glob(folder: Path, pattern: str) -> list[TextFile]:
    names = glob.glob(pattern, root_dir=folder, recursive=True)
    return [TextFile(folder / name, Path(name).as_posix()) for name in names if (folder / name).is_file()]
