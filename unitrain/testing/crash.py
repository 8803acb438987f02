"""Crash points: end a process before each of its file operations in turn, and look at what is left.

Whoever writes checkpoints, by whatever calls, must leave either the previous one or the new one, whole.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from typing import Any

CRASHED = 86
# Calls that change what a file system holds. `open` stands for Python's own and counts when it may create.
_CALLS = (
    "write",
    "writev",
    "pwrite",
    "fsync",
    "rename",
    "replace",
    "link",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
    "open",
)


def survived_crashes(save: Callable[[], None], check: Callable[[], None]) -> int:
    """Run `save` in a child that dies before its n-th file operation, for every n, and `check` after each.

    `save` must start from the same state each time (a new folder for the new checkpoint does). Returns the number of
    crash points; what `check` raises comes out with the point as a note. Needs fork, so start no threads before.
    """
    point = 0
    while True:
        code = _in_child(save, point)
        try:
            check()
        except BaseException as error:
            error.add_note(f"after a crash before file operation {point}")
            raise
        if code == 0:
            return point
        if code != CRASHED:
            raise AssertionError(f"the save ended with exit code {code} and not by the crash at operation {point}")
        point += 1


def _in_child(save: Callable[[], None], point: int) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        _crash_before(point)
        save()
        code = 0
    finally:
        os._exit(code)


def _crash_before(point: int) -> None:
    """Make this process exit in place of its `point`-th file operation."""
    left = point

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(CRASHED)
            left -= 1
            return call(*args, **kwargs)

        return replacement

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    opened = builtins.open

    def open_for_writing_counts(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opener = counted(opened) if any(letter in mode for letter in "wxa+") else opened
        return opener(file, mode, *args, **kwargs)

    builtins.open = open_for_writing_counts
