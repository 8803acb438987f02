"""One rank as its agent sees it: its process, and what it tells through its pipe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .rank import RankStart

_CHUNK_BYTES, _CHUNKS_AT_ONCE = 65536, 64
_MESSAGE_BYTES = 4 << 20  # of one message of a rank; what is longer is dropped, and its memory with it


@dataclass
class Rank:
    """One rank as its agent sees it."""

    start: RankStart
    pipe: int  # the agent's end
    pid: int | None = None
    code: int | None = None  # how it ended; None: it has not
    spoke: bool = False  # it has told of an error
    unread: bytes = b""
    overlong: bool = False  # the line of which `unread` was the start is too long

    @property
    def alive(self) -> bool:
        """True until it has ended, also before it has started."""
        return self.code is None

    def messages(self) -> list[dict[str, Any]]:
        """What the rank has told since the last call."""
        told = []
        try:
            # Not until the pipe is empty: a rank that writes without end must not keep the agent from its work.
            for _ in range(_CHUNKS_AT_ONCE):
                chunk = os.read(self.pipe, _CHUNK_BYTES)
                if not chunk:
                    break
                *lines, rest = chunk.split(b"\n")
                for line in lines:
                    if not self.overlong and (message := _message(self.unread + line)) is not None:
                        told.append(message)
                    self.unread, self.overlong = b"", False
                self.overlong = self.overlong or len(self.unread) + len(rest) > _MESSAGE_BYTES
                self.unread = b"" if self.overlong else self.unread + rest
        except BlockingIOError:
            pass
        return told


def _message(line: bytes) -> dict[str, Any] | None:
    """What a rank has told, if that can be understood: two of its threads may write long lines at once."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        return None
    wanted = _FACTS.get(message["kind"], {})
    return message if all(isinstance(message.get(name), kind) for name, kind in wanted.items()) else None


# kind of a message -> what it must tell, beside what only the screen shows
_FACTS: Mapping[str, Mapping[str, Any]] = {
    "signal": {"number": int},
    "progress": {"record": dict, "line": str, "steps": int},
    "error": {
        **{"rank": int, "pid": int, "exit_code": int, "monotonic": float, "log_size": int | None},
        **{"host": str, "type": str, "message": str, "traceback": str},
    },
}
