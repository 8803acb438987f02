"""One run's folder: what was asked, what happened, and where everything of it lies.

    recipe.yaml  job.json  events.jsonl  metrics.jsonl  ledger.jsonl  logs/  checkpoints/  failures/

Lines are appended by single writes, so that the agent, a rank and the command line may write at once. JSON knows no
NaN and no infinity: they are written as null.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import UnitrainError, UserError, did_you_mean
from .recipe import Recipe
from .recipe_file import to_yaml

RUNS = Path("runs")


class Run:
    """A run by its folder; the folder's name is the run's id."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))  # its name must be a name, not `.` or `..`
        self.id = self.folder.name

    @classmethod
    def create(cls, folder: str | Path | None, recipe: Recipe, *, runs: Path = RUNS) -> Run:
        """Make the folder, `runs/<name>-<time>-<short id>` where none is given, and write the recipe into it.

        Raises UserError when the folder holds a run already, or cannot be made.
        """
        try:
            run = cls(_new_folder(recipe.name, runs) if folder is None else folder)
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run's folder cannot be made: {error.filename}: {error.strerror}") from error
        try:
            with run.recipe_path.open("x", encoding="utf-8") as file:  # "x": of two at once, one is refused
                file.write(to_yaml(recipe))
        except FileExistsError:
            cls.refuse_taken(run.folder)
            raise
        except OSError as error:
            raise UserError(f"{run.recipe_path} cannot be written: {error.strerror}") from error
        return run

    @classmethod
    def open(cls, folder_or_id: str | Path, *, runs: Path = RUNS) -> Run:
        """The run in a folder, or of that id below `runs`. Raises UserError with the closest id."""
        for folder in (Path(folder_or_id), runs / folder_or_id):
            if cls.exists(folder):
                return cls(folder)
        if Path(folder_or_id).is_dir():
            raise UserError(f"{folder_or_id} holds no run: there is no recipe.yaml in it")
        known = [run.id for run in cls.all(runs)]
        near = did_you_mean(str(folder_or_id), known)
        raise UserError(f"no run {str(folder_or_id)!r}, neither a folder nor below {runs}{near or _newest(known)}")

    @classmethod
    def refuse_taken(cls, folder: str | Path) -> None:
        """Raise UserError when the folder holds a run already."""
        if cls.exists(folder):
            raise UserError(
                f"{folder} holds a run already: go on with `unitrain resume {folder}`, or name another folder"
            )

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """True when the folder holds a run."""
        return (Path(folder) / "recipe.yaml").is_file()

    @classmethod
    def all(cls, runs: Path = RUNS) -> list[Run]:
        """Every run below `runs`, oldest first."""
        folders = [path for path in runs.glob("*") if cls.exists(path)]
        return [cls(path) for path in sorted(folders, key=lambda path: (path / "recipe.yaml").stat().st_mtime)]

    @property
    def recipe_path(self) -> Path:
        """The recipe that the next start reads."""
        return self.folder / "recipe.yaml"

    def checkpoints(self, recipe: Recipe) -> str:
        """Path or URL of the run's checkpoints."""
        return recipe.checkpoint.path or str(self.folder / "checkpoints")

    def rewrite_recipe(self, recipe: Recipe) -> Path | None:
        """Make this the run's recipe; the one before stays as recipe-<n>.yaml, which is returned if they differ."""
        text = to_yaml(recipe)
        before = self.recipe_path.read_text(encoding="utf-8")
        if text == before:
            return None
        number = 1
        while (kept := self.folder / f"recipe-{number}.yaml").exists():
            number += 1
        _replace(kept, before)
        _replace(self.recipe_path, text)
        return kept

    def take_back_recipe(self, kept: Path) -> None:
        """Make a recipe that `rewrite_recipe` kept the run's own again."""
        kept.replace(self.recipe_path)

    def launched(self) -> dict[str, Any]:
        """The newest `launch` event: launcher, job_id, cwd, ...; empty when no launcher started this run."""
        found: dict[str, Any] = next((event for event in reversed(self.events()) if event["event"] == "launch"), {})
        if odd := [name for name in ("launcher", "job_id", "cwd") if not isinstance(found.get(name), str | None)]:
            raise UserError(f"{self.folder / 'events.jsonl'} is damaged: the launch has no {odd[0]} that is a word")
        return found

    def event(self, event: str, **facts: Any) -> None:
        """Append to events.jsonl: what happened, when (`time`: seconds since 1970), and its facts."""
        _append(self.folder / "events.jsonl", {"time": time.time(), "event": event, **facts})

    def metric(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl."""
        _append(self.folder / "metrics.jsonl", record)

    def events(self) -> list[dict[str, Any]]:
        """What happened so far, oldest first."""
        return [
            record
            for record in _records(self.folder / "events.jsonl")
            if isinstance(record.get("event"), str) and isinstance(record.get("time"), int | float)
        ]

    def metrics(self) -> list[dict[str, Any]]:
        """Every record so far, train and eval, each step once."""
        return [record for record in _records(self.folder / "metrics.jsonl") if type(record.get("step")) is int]

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`: a resumed run goes through them again."""
        _rewrite(
            self.folder / "metrics.jsonl", lambda record: type(record.get("step")) is int and record["step"] <= step
        )


def new_id(name: str) -> str:
    """An id that no other run has: `<name>-<yyyymmdd-hhmmss>-<4 hex digits>`, local time."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _new_folder(name: str, runs: Path) -> Path:
    """A folder that this process alone made."""
    runs.mkdir(parents=True, exist_ok=True)
    while True:
        folder = runs / new_id(name)
        try:
            folder.mkdir()
        except FileExistsError:
            continue  # the same second and the same two bytes
        return folder


def _newest(ids: list[str]) -> str:
    return f"; the newest is {ids[-1]!r}" if ids else ""


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """One line by one write. A line that a full disk tore before is closed first, and lost alone.

    What looks torn may be another process's line on its way: an empty line follows it then, which no reader minds.
    """
    line = json.dumps(_json(record), allow_nan=False).encode() + b"\n"
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(file, line)
        finally:
            os.close(file)
    except OSError as error:
        raise UnitrainError(f"{path} cannot be written: {error.strerror}") from error
    if written < len(line):
        raise UnitrainError(f"{path} took {written} of {len(line)} bytes: the disk is full")


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; one that was torn by a crash is no record."""
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and line.endswith(b"\n"):
            found.append((line, record))
    return found


def _rewrite(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    if path.exists():
        _replace(path, b"".join(line for line, record in _lines(path) if wanted(record)))


def _replace(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UnitrainError(f"{path} cannot be written: {error.strerror}") from error


def _json(value: Any) -> Any:
    """The value with null for every NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value
