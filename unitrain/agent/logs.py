"""Where the output of ranks goes, and how it is read while it grows."""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UserError

_POLL_SECONDS = 0.05  # files have no portable way to say that they grew


def attempt_folders(run_dir: Path) -> list[Path]:
    """The log folders of a run, oldest attempt first."""
    found = [path for path in (run_dir / "logs").glob("attempt-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=attempt_number)


def attempt_number(folder: Path) -> int:
    """Which attempt a log folder is of, from 0."""
    return int(folder.name.rpartition("-")[2])


def new_attempt(run_dir: Path) -> Path:
    """The log folder of the next attempt: made now, or by whoever prepared the attempt, when nothing is in it yet."""
    folders = attempt_folders(run_dir)
    if folders and not any(folders[-1].iterdir()):
        return folders[-1]
    folder = run_dir / "logs" / f"attempt-{attempt_number(folders[-1]) + 1 if folders else 0}"
    folder.mkdir(parents=True, exist_ok=True)  # another node may make it at this moment
    return folder


def rank_log(attempt: Path, rank: int) -> Path:
    """The file of one rank."""
    return attempt / f"rank-{rank}.log"


class GrowingFile:
    """Reads what was added to a file since the last read; the file may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a read may end inside a character

    def size(self) -> int:
        """Bytes that are there by now."""
        return self.path.stat().st_size

    def read(self, up_to: float = math.inf) -> str:
        """The new text, at most up to a position in bytes."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                data = file.read() if up_to == math.inf else file.read(max(int(up_to) - self.position, 0))
        except FileNotFoundError:
            return ""
        self.position += len(data)
        return self._decoder.decode(data)


def log_lines(find: Callable[[], Path | None], ended: Callable[[], bool], *, follow: bool) -> Iterator[str]:
    """Lines of a log; with `follow` those that are still to come, also of later attempts, until the job has ended."""
    rest, file = "", None
    while True:
        last = not follow or ended()  # asked before reading: what comes before the end is read
        path = find()
        text = file.read() if file else ""
        if path is not None and (file is None or file.path != path):  # another attempt: nothing is added to the old log
            file = GrowingFile(path)
            text += ("\n" if rest + text and not text.endswith("\n") else "") + file.read()
        *lines, rest = (rest + text).split("\n")
        yield from lines
        if last:
            break
        time.sleep(_POLL_SECONDS)
    if rest:
        yield rest


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log; nothing where there is none."""
    text = GrowingFile(path).read()
    return text.splitlines()[-count:]


def find_log(run_dir: Path, rank: int, *, since_attempt: int = 0) -> Path | None:
    """The newest log of a rank."""
    folders = [folder for folder in attempt_folders(run_dir) if attempt_number(folder) >= since_attempt]
    path = rank_log(folders[-1], rank) if folders else None
    return path if path is not None and path.exists() else None


def no_log(run_dir: Path, rank: int) -> UserError:
    """What to say where a rank has no log."""
    folders = attempt_folders(run_dir)
    there = sorted(int(path.stem.rpartition("-")[2]) for path in folders[-1].glob("rank-*.log")) if folders else []
    known = f"ranks with logs: {', '.join(map(str, there))}" if there else "no rank has started yet"
    return UserError(f"{run_dir} has no log of rank {rank}; {known}")
