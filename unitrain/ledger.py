"""The ledger of a run: which samples each durable step was trained on, in lines that only grow.

Kinds of lines, each with its number `n`, the CRC of the line before (`prev`) and its own (`crc`):

    begin     an attempt goes on from `step`, with these ranks, this seed, batch, and number of samples (`size`)
    steps     steps `first` to `last` are durable, with the CRC of the ids that the loop took for them
    rollback  the guard went back to step `to` and skips the window of positions `skip`

A checkpoint holds the lines of its own steps too: what a crash kept from the ledger, the next attempt adds.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # an agent reads it too
    import numpy as np
    from numpy.typing import NDArray

FILE = "ledger.jsonl"
_TAIL_BYTES = 1 << 20  # more than any line has
_EVERY_LINE = {"n": int, "prev": str, "kind": str, "crc": str}
_FACTS: Mapping[str, Mapping[str, type]] = {
    "begin": {
        **{"attempt": str, "step": int, "strategy": str, "world_size": int, "seed": int, "global_batch": int},
        **{"size": int, "skipped": list},
    },
    "steps": {"attempt": str, "first": int, "last": int, "ids_crc": str},
    "rollback": {"attempt": str, "step": int, "to": int, "skip": list, "number": int},
}


class LedgerLines(NamedTuple):
    """The sound lines of a ledger, and what is wrong with the others."""

    lines: list[dict[str, Any]]
    problems: list[str]


class Trail:
    """What the loop of this attempt has taken since the last save: a CRC over the ids of all samples in order."""

    def __init__(self, step: int, attempt: str) -> None:
        self._attempt = attempt
        self._begin = step
        self._crc = 0
        self.undurable: list[dict[str, Any]] = []  # of saves that have not been reported yet

    def take(self, ids: NDArray[np.int64]) -> None:
        """One more step has used these samples."""
        self._crc = zlib.crc32(ids.tobytes(), self._crc)

    def close(self, step: int) -> list[dict[str, Any]]:
        """The facts of all steps up to this one that may not be in the ledger yet; they become durable together."""
        if step > self._begin:
            facts = {"attempt": self._attempt, "first": self._begin + 1, "last": step, "ids_crc": f"{self._crc:08x}"}
            self.undurable.append(facts)
            self._begin, self._crc = step, 0
        return list(self.undurable)

    def durable(self, step: int) -> list[dict[str, Any]]:
        """What has become durable with the checkpoint of this step."""
        found = [facts for facts in self.undurable if facts["last"] <= step]
        for facts in found:  # in place: the loop may add others meanwhile
            self.undurable.remove(facts)
        return found


class Ledger:
    """Appends to a run's ledger. One process at a time writes: rank 0 of the newest attempt."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE
        self._waiting: list[dict[str, Any]] = []  # a full disk did not take them

    def append(self, kind: str, **facts: Any) -> None:
        """One durable line. A disk that does not take it costs a warning, and the next call tries again."""
        self._waiting.append({"kind": kind, **facts})
        try:
            while self._waiting:
                self._write(self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            print(f"warning: {self._path} cannot be written: {error.strerror}", flush=True)

    def recover(self, known: list[dict[str, Any]]) -> None:
        """Add what a checkpoint knows of its steps and the ledger does not."""
        there = {_key(line) for line in read_ledger(self._path).lines if line["kind"] == "steps" and well_formed(line)}
        for facts in known:
            if _key(facts) not in there:
                self.append("steps", **facts)

    def rollbacks(self) -> list[dict[str, Any]]:
        """The guard's decisions so far."""
        return [line for line in read_ledger(self._path).lines if line["kind"] == "rollback" and well_formed(line)]

    def _write(self, facts: Mapping[str, Any]) -> None:
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(file).st_size
            tail = os.pread(file, min(size, _TAIL_BYTES), max(size - _TAIL_BYTES, 0))
            before = next((found for line in reversed(tail.split(b"\n")) if (found := _sound(line))), None)
            number, prev = (before["n"] + 1, before["crc"]) if before else (0, "")
            line = _line({"n": number, "prev": prev, **facts})
            if tail and not tail.endswith(b"\n"):
                line = b"\n" + line  # a crash tore the last one
            if os.write(file, line) < len(line):
                raise OSError(28, "No space left on device")
            os.fsync(file)
        finally:
            os.close(file)


def read_ledger(path: Path) -> LedgerLines:
    """The lines of a ledger in order, each checked alone and against the one before."""
    lines: list[dict[str, Any]] = []
    problems: list[str] = []
    torn = 0
    content = path.read_bytes() if path.exists() else b""
    for place, text in enumerate(content.split(b"\n"), start=1):
        if not text:
            continue
        line = _sound(text)
        if line is None:
            torn = place
            continue
        number, prev = (lines[-1]["n"] + 1, lines[-1]["crc"]) if lines else (0, "")
        if (line["n"], line["prev"]) != (number, prev):
            what = f"line {torn} was changed" if torn else f"{line['n'] - number} lines are lost or out of order"
            problems.append(f"{path.name}:{place}: {what}: it does not follow the line before")
        # A torn line that the next one takes no notice of was never durable.
        torn = 0
        lines.append(line)
    if torn and content.endswith(b"\n"):
        problems.append(f"{path.name}:{torn}: this line was changed: its CRC is not that of its text")
    return LedgerLines(lines, problems)


def well_formed(line: Mapping[str, Any]) -> bool:
    """True for a line that a run writes."""
    wanted = _FACTS.get(line["kind"], {"kind": list})
    windows = [*line.get("skipped", ()), *([line["skip"]] if "skip" in line else [])]
    return (
        all(type(line.get(name)) is kind for name, kind in wanted.items())
        and all(isinstance(window, list) and [type(end) for end in window] == [int, int] for window in windows)
        and line.get("size", 1) > 0
        and line.get("global_batch", 1) > 0
    )


def _key(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    return facts["attempt"], facts["first"], facts["last"]


def _line(facts: Mapping[str, Any]) -> bytes:
    body = json.dumps(dict(facts), sort_keys=True, allow_nan=False)
    return json.dumps({**json.loads(body), "crc": _crc(body)}, sort_keys=True).encode() + b"\n"


def _sound(text: bytes) -> dict[str, Any] | None:
    """The line's facts; None where its CRC is another."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not all(isinstance(line.get(name), kind) for name, kind in _EVERY_LINE.items()):
        return None
    body = json.dumps({name: value for name, value in line.items() if name != "crc"}, sort_keys=True)
    return line if line["crc"] == _crc(body) else None


def _crc(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
