"""A copy of the project's code in the run's folder, so that edits after the launch do not reach ranks that start later.

    RUN_DIR/code/      tracked, changed and new files of the git repository; what git ignores is not copied
    RUN_DIR/code.json  where they come from: commit, what was changed, a digest of names, modes and contents
    RUN_DIR/code.diff  how they differ from the commit

`survey` looks and refuses, `take` copies, `enter` moves a rank into the copy.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .agent.records import read_record, write_record
from .errors import UserError
from .recipe import CodeRecipe, Recipe
from .run import RUNS
from .world import environment

FOLDER, FILE, DIFF = "code", "code.json", "code.diff"
MIB = 1 << 20
_MOST_NAMED = 8  # of refused files in one message
_MOST_DIFF_BYTES = 16 * MIB

# Names by which people and tools keep keys and passwords. Case does not matter.
SECRETS = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".pypirc", ".npmrc", ".htpasswd"),
    *("*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.asc", "*.gpg"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*_rsa", "*_ed25519"),
    *("credentials", "credentials.*", "*credentials*.json", "*credentials*.csv", ".git-credentials"),
    *("service-account*.json", "service_account*.json", "kubeconfig*", ".dockercfg", "secret", "secret.*", "secrets*"),
    *("token", "*.token", "password*", "passwords*"),
)
SECRET_FOLDERS = {".ssh", ".aws", ".gnupg", ".kube", ".docker", ".azure", ".gcloud"}
HARMLESS = ("*.pub", "*.example", "*.sample", "*.template", "*.dist", "*.py", "*.md", "*.rst")
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{16}")
_HEAD_BYTES = 64 << 10


class File(NamedTuple):
    """One file of a snapshot: a path below the project's top folder, and its bytes; a link's target is not copied."""

    path: str
    size: int
    link: str | None = None


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a snapshot will hold. Nothing has been copied."""

    top: Path  # of the project
    folder: str  # where the launch began, below it; "" at the top
    files: tuple[File, ...]
    links: tuple[str, ...]  # what is linked to instead
    commit: str | None  # None: there is none yet
    changed: tuple[str, ...]  # tracked files that differ from the commit
    new: tuple[str, ...]  # files that git does not track, and does not ignore

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def __str__(self) -> str:
        commit = "no commit" if self.commit is None else f"commit {self.commit[:12]}"
        return (
            f"{len(self.files)} files, {self.size / MIB:.1f} MiB, of {self.top}: "
            f"{commit}, {len(self.changed)} changed, {len(self.new)} new"
        )


# --- before the launch -------------------------------------------------------------------------------------------


def survey(folder: Path, recipe: Recipe, *, without: Iterable[Path] = ()) -> Survey:
    """What a snapshot of the project around `folder` will hold; the folders `without` are no part of it.

    Raises UserError with every file that must not go along: secrets, large files, links that lead out.
    """
    code = recipe.code
    top = Path(_git(folder, "rev-parse", "--show-toplevel").removesuffix("\n"))
    here = folder.resolve().relative_to(top.resolve()).as_posix()
    runs = [path.parent for depth in ("*", "*/*") for path in (folder / RUNS).glob(f"{depth}/recipe.yaml")]
    inside = [below for path in (*without, *runs) if (below := _below(path, top))]
    left_out = [*code.leave_out, *map(glob.escape, (*code.link, *inside))]
    tracked, new = _listed(top)
    paths = sorted({path for path in (*tracked, *new) if not _matches(path, left_out)})
    files = [file for path in paths if (file := _found(top, path)) is not None]
    _refuse(files, top, code)
    commit = _git(top, "rev-parse", "--verify", "--quiet", "HEAD", may_fail=True).strip() or None
    names = {file.path for file in files}
    changed = [] if commit is None else _split(_git(top, "diff", "--name-only", "-z", "--no-renames", "HEAD"))
    surveyed = Survey(
        top=top,
        folder="" if here == "." else here,
        files=tuple(files),
        links=tuple(code.link),
        commit=commit,
        changed=tuple(path for path in changed if not _matches(path, left_out)),
        new=tuple(path for path in new if path in names),
    )
    _refuse_absent(surveyed, recipe, folder)
    return surveyed


def _git(folder: Path, *arguments: str, may_fail: bool = False) -> str:
    """What git says; nothing of the repository's own configuration is run."""
    # fsmonitor, an external diff and textconv are programs that a repository's configuration names.
    command = ["git", "--literal-pathspecs", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false", *arguments]
    environ = {**environment(), "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, env=environ, check=False)
    except FileNotFoundError as error:
        raise UserError("code.snapshot needs git, which is not installed here; set code.snapshot=false") from error
    if done.returncode and not may_fail:
        said = os.fsdecode(done.stderr).strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(f"code.snapshot asks git about {folder}, and it says: {said[0]}; or set code.snapshot=false")
    return os.fsdecode(done.stdout)


def _listed(top: Path) -> tuple[list[str], list[str]]:
    """What git tracks, and what it neither tracks nor ignores; submodules and repositories in the repository too."""
    lists: dict[str, list[str]] = {"--cached": [], "--others": []}
    for which, found in lists.items():
        for path in _split(_git(top, "ls-files", "-z", which, "--exclude-standard")):
            inner = top / path
            if inner.is_symlink() or not inner.is_dir():
                found.append(path)
            elif (inner / ".git").exists():  # or it was never checked out, and git would list this repository again
                tracked, new = _listed(inner)
                found += [f"{path.rstrip('/')}/{below}" for below in tracked]
                lists["--others"] += [f"{path.rstrip('/')}/{below}" for below in new]
    return lists["--cached"], lists["--others"]


def _split(text: str) -> list[str]:
    return [path for path in text.split("\0") if path]


def _below(path: Path, top: Path) -> str:
    """The path below the top folder; empty where it is not."""
    whole, top = path.resolve(), top.resolve()
    return whole.relative_to(top).as_posix() if whole.is_relative_to(top) and whole != top else ""


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """True when a pattern fits the path, its name, or a folder that it is in."""
    parts = path.split("/")
    folders = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
    return any(
        fnmatch.fnmatchcase(name, pattern.rstrip("/")) for pattern in patterns for name in (path, parts[-1], *folders)
    )


def _found(top: Path, path: str) -> File | None:
    """None for a file that is tracked and was deleted."""
    try:
        known = os.lstat(top / path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(known.st_mode):
        return File(path, 0, os.readlink(top / path))
    return File(path, known.st_size)


def _refuse(files: Sequence[File], top: Path, code: CodeRecipe) -> None:
    """Raise UserError with what must not go along, and what to do."""
    there = {file.path for file in files}
    folders = {"/".join(path.split("/")[:depth]) for path in there for depth in range(path.count("/") + 1)}
    refused: list[str] = []
    for file in files:
        if file.link is not None:
            target = os.path.normpath(os.path.join(os.path.dirname(file.path), file.link))
            if os.path.isabs(file.link) or target.startswith(".."):
                refused.append(f"{file.path!r} is a link out of the project, to {file.link!r}")
            elif target not in there and target not in folders and not _matches(target, code.link):
                refused.append(f"{file.path!r} is a link to {file.link!r}, which does not go along")
        elif _matches(file.path, code.allow):
            continue
        elif looks_secret(file.path):
            refused.append(f"{file.path!r} has the name of a secret")
        elif file.size > code.file_mb * MIB:
            refused.append(f"{file.path!r} has {file.size / MIB:.1f} MiB, more than code.file_mb={code.file_mb:g}")
        elif _holds_private_key(top / file.path):
            refused.append(f"{file.path!r} holds a private key")
    if refused:
        more = [f"and {len(refused) - _MOST_NAMED} more"] if len(refused) > _MOST_NAMED else []
        raise UserError(
            "\n  - ".join(["code.snapshot cannot copy all files of the project:", *refused[:_MOST_NAMED], *more])
            + "\nname them in code.leave_out, or data in code.link, or what is no harm in code.allow; or have git "
            "ignore them"
        )
    if (total := sum(file.size for file in files)) > code.total_mb * MIB:
        largest = sorted(files, key=lambda file: -file.size)[:3]
        raise UserError(
            f"code.snapshot would copy {total / MIB:.1f} MiB, more than code.total_mb={code.total_mb:g}; the largest "
            f"are {', '.join(repr(file.path) for file in largest)}: name such in code.leave_out or code.link"
        )


def looks_secret(path: str) -> bool:
    """True for a name by which keys and passwords are kept."""
    *folders, name = path.lower().split("/")
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in HARMLESS):
        return False
    return bool(SECRET_FOLDERS.intersection(folders)) or any(fnmatch.fnmatchcase(name, word) for word in SECRETS)


def _holds_private_key(path: Path) -> bool:
    try:
        with open(_opened(path), "rb") as file:
            return _PRIVATE_KEY.search(file.read(_HEAD_BYTES)) is not None
    except OSError:
        return False  # it has changed meanwhile: `take` says so


def _refuse_absent(surveyed: Survey, recipe: Recipe, folder: Path) -> None:
    """Raise UserError where the recipe's own trainer or data is in the project, but will not be in the copy."""
    module = recipe.trainer.rpartition(":")[0]
    if module.endswith(".py"):
        wanted = {"trainer": Path(module)}
    else:
        package = folder.joinpath(*module.partition(".")[:1])
        wanted = {"trainer": next((path for path in (package, package.with_suffix(".py")) if path.exists()), Path())}
    # A relative path starts in the copy then. One that is not there now may be made by the run itself.
    wanted |= {
        f"data.{name}": folder / value
        for name, value in recipe.data.options.items()
        if isinstance(value, str) and value and not os.path.isabs(value) and _exists(folder / value)
    }
    there = [file.path for file in surveyed.files]
    for key, path in wanted.items():
        if path == Path() or path.resolve() == surveyed.top.resolve():
            continue  # an installed package; the whole project
        below = _below(path, surveyed.top)
        if not below:
            raise UserError(
                f"{key} is in {path}, outside of the project {surveyed.top} that code.snapshot copies; "
                + ("move it there" if key == "trainer" else "give its whole path")
            )
        copied = any(name == below or name.startswith(f"{below}/") for name in there)
        if not copied and not _matches(below, surveyed.links):
            raise UserError(
                f"{key} is in {below!r}, which code.snapshot does not copy because git ignores it or code.leave_out "
                f"names it; {'have git track it' if key == 'trainer' else 'name it in code.link'}"
            )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # it is no path: too long a text
        return False


# --- at the launch -----------------------------------------------------------------------------------------------


def take(surveyed: Survey, run_dir: Path) -> dict[str, Any]:
    """Copy the files and say in code.json what they are; a snapshot that the run has already stays beside.

    Raises UserError where a file has changed its kind or vanished since, or the disk does not take it.
    """
    _set_aside(run_dir)
    draft = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=run_dir))
    try:
        os.chmod(draft, 0o755)
        for file in surveyed.files:
            _copy(surveyed.top / file.path, draft / file.path, file)
        (draft / surveyed.folder).mkdir(parents=True, exist_ok=True)
        found = digest(draft)
        for name in surveyed.links:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).symlink_to(surveyed.top.resolve() / name)
        (run_dir / DIFF).write_bytes(_diff(surveyed))
        draft.replace(run_dir / FOLDER)
    except OSError as error:
        raise UserError(f"the project's files cannot be copied: {error.filename}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # it is not there any more, if all went well
    record = {
        "top": str(surveyed.top),
        "folder": surveyed.folder,
        "commit": surveyed.commit,
        "changed": list(surveyed.changed),
        "new": list(surveyed.new),
        "links": list(surveyed.links),
        "files": len(surveyed.files),
        "bytes": surveyed.size,
        "sha256": found,
    }
    write_record(run_dir / FILE, **record)
    return record


def _set_aside(run_dir: Path) -> None:
    """Keep an older snapshot as code-<n>: what earlier attempts have run."""
    if not (run_dir / FOLDER).exists():
        return
    number = 1
    while (run_dir / f"{FOLDER}-{number}").exists():
        number += 1
    for name in (FOLDER, FILE, DIFF):
        if (run_dir / name).exists():
            (run_dir / name).rename(run_dir / name.replace(FOLDER, f"{FOLDER}-{number}", 1))


def _copy(source: Path, target: Path, file: File) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.link is not None:
        target.symlink_to(file.link)
        return
    fd = _opened(source)
    with open(fd, "rb") as old, target.open("xb") as new:
        known = os.fstat(fd)
        if not stat.S_ISREG(known.st_mode) or known.st_size > max(2 * file.size, MIB):
            raise UserError(f"{source} was changed while it was looked at; launch again")
        shutil.copyfileobj(old, new)
        # Not to be written: who edits a copy by accident would not notice that the next run does not have it.
        os.fchmod(new.fileno(), 0o555 if known.st_mode & stat.S_IXUSR else 0o444)


def _opened(path: Path) -> int:
    """A descriptor of the file itself: not of what a link in its place leads to, and without waiting for a pipe."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _diff(surveyed: Survey) -> bytes:
    """Of files that go along, and of those that were removed, unless they are named as secrets are."""
    copied = {file.path for file in surveyed.files}
    wanted = [path for path in surveyed.changed if path in copied or not looks_secret(path)]
    if surveyed.commit is None or not wanted:
        return b""
    arguments = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", surveyed.commit, "--")
    parts, size = [], 0
    for path in wanted:
        text = _git(surveyed.top, *arguments, path)
        size += len(text)
        if size > _MOST_DIFF_BYTES:
            parts.append(f"# {path} and what follows: the whole is larger than {_MOST_DIFF_BYTES // MIB} MiB\n")
            break
        parts.append(text)
    return os.fsencode("".join(parts))


def digest(folder: Path, *, without: Sequence[str] = ()) -> str:
    """SHA-256 over names, kinds and contents of a tree, the same on every machine and for every order and time.

    What Python compiles beside the files does not count, nor do the paths `without`.
    """
    whole = hashlib.sha256()
    for path in sorted(set(_walk(folder, "")).difference(without), key=os.fsencode):
        known = os.lstat(folder / path)
        if stat.S_ISLNK(known.st_mode):
            kind, content = "link", hashlib.sha256(os.fsencode(os.readlink(folder / path))).hexdigest()
        else:
            kind = "program" if known.st_mode & stat.S_IXUSR else "file"
            with (folder / path).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(b"%s %s %d:%s\n" % (kind.encode(), content.encode(), len(os.fsencode(path)), os.fsencode(path)))
    return whole.hexdigest()


def _walk(folder: Path, below: str) -> Iterator[str]:
    for entry in os.scandir(folder / below):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            if entry.name != "__pycache__":
                yield from _walk(folder, path)
        else:
            yield path


# --- recipes, which name the trainer's file ----------------------------------------------------------------------


def settle(recipe: Recipe, run_dir: Path | None, folder: Path, *, anew: bool = False) -> tuple[Recipe, Survey | None]:
    """The recipe as the run's folder is to hold it, and what is to be copied: nothing where the run has its copy.

    With `anew` a run that has one gets another, of the project as it is now. Raises UserError (see `survey`).
    """
    record = None if run_dir is None else _record(run_dir)
    if record is not None and run_dir is not None:
        recipe = _moved(recipe, run_dir / FOLDER, Path(record["top"]))
    if not recipe.code.snapshot:
        return recipe, None
    if record is not None and run_dir is not None and not anew:
        _refuse_touched(run_dir, record)
        return _moved(recipe, Path(record["top"]), Path(FOLDER)), None
    surveyed = survey(folder, recipe, without=[] if run_dir is None else [run_dir])
    return _moved(recipe, surveyed.top, Path(FOLDER)), surveyed


def _record(run_dir: Path) -> dict[str, Any] | None:
    """What `take` left there, if it was. Raises UserError for anything else."""
    record = read_record(run_dir / FILE) if (run_dir / FILE).exists() else None
    if record is not None:
        kinds = {"top": str, "folder": str, "sha256": str, "links": list}
        if odd := [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]:
            raise UserError(f"{run_dir / FILE} is damaged: it has no {odd[0]}; launch the run anew")
    return record


def _moved(recipe: Recipe, old: Path, new: Path) -> Recipe:
    """The recipe with its trainer's file below another folder; beside the recipe where that is not a whole path."""
    file, colon, name = recipe.trainer.rpartition(":")
    if not file.endswith(".py"):
        return recipe
    # The top folder may be known by a path with links in it, and the trainer's file without, or the other way round.
    for path, start in ((Path(file), old), (Path(file).resolve(), old.resolve())):
        if path.is_relative_to(start):
            return recipe.replace(trainer=f"{new / path.relative_to(start)}{colon}{name}")
    return recipe


def _refuse_touched(run_dir: Path, record: dict[str, Any]) -> None:
    if digest(run_dir / FOLDER, without=record["links"]) != record["sha256"]:
        raise UserError(
            f"{run_dir / FOLDER} is not what was copied at the launch: somebody has edited it; "
            "take a new snapshot with `unitrain resume --new-code`"
        )


# --- in a rank ---------------------------------------------------------------------------------------------------


def enter(run_dir: Path) -> Callable[[], None]:
    """Move this process into the run's copy: its working directory and whatever it imports of the project from now on.

    Returns a check to call once the trainer is imported, which raises UserError where a module came from elsewhere.
    """
    record = _record(run_dir)
    if record is None:
        raise UserError(f"{run_dir} has no {FILE}, though its recipe asks for code.snapshot; launch the run anew")
    code, top = (run_dir / FOLDER).absolute(), Path(record["top"])
    known = set(sys.modules)
    here = code / record["folder"]
    os.chdir(here)
    sys.path[:] = _importable(sys.path, here, code, top)
    before = environment().get("PYTHONPATH", "").split(os.pathsep)
    # For what this rank starts itself: workers that load data are new processes.
    os.environ["PYTHONPATH"] = os.pathsep.join(_importable([path for path in before if path], here, code, top))
    return lambda: _refuse_others(known, code, top)


def _importable(paths: Sequence[str], here: Path, code: Path, top: Path) -> list[str]:
    """Where modules are looked for: in the copy first, and in no folder of the project of which there is a copy."""
    found = [str(here), *([str(code / "src")] if (code / "src").is_dir() else [])]
    for path in paths:
        whole = Path(path).absolute()
        inside = whole.is_relative_to(top) and not whole.is_relative_to(code)
        if inside and (code / whole.relative_to(top)).is_dir():
            found.append(str(code / whole.relative_to(top)))
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _refuse_others(known: set[str], code: Path, top: Path) -> None:
    """An editable install, for one, leads to the project itself past all search paths."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name in known or name.partition(".")[0] == "unitrain" or not isinstance(file, str):
            continue
        path = Path(file)
        if path.is_relative_to(top) and not path.is_relative_to(code) and (code / path.relative_to(top)).exists():
            raise UserError(
                f"the module {name} was imported from {path}, which later edits change, and not from the run's copy "
                f"{code / path.relative_to(top)}; uninstall the project (pip uninstall), or set code.snapshot=false"
            )
