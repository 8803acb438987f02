"""What test systems on one machine share: they take turns, and find the processes that a run has left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TURN_SECONDS = 800  # for another test run to be done with its own


@contextlib.contextmanager
def turn(system: str) -> Iterator[None]:
    """Wait until no other test run of this machine has its system of that name up; its addresses are there once."""
    with (Path(tempfile.gettempdir()) / f"unitrain-{system}.lock").open("w") as file:
        deadline = time.monotonic() + TURN_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    pytest.skip(f"not run: another test run has had this machine's {system} for {TURN_SECONDS} s")
                time.sleep(1)
        yield


def processes(run_dir: Path) -> list[str]:
    """Those whose command line names the run's folder, also in containers: this machine's kernel shows all."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        ours = f"{run_dir}\0".encode() in words or f"{run_dir}/".encode() in words
        if ours and int(path.parent.name) != os.getpid():
            found.append(f"{path.parent.name}: {words.decode(errors='replace')[:200]}")
    return found
