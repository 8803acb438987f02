"""Which job works under a root of checkpoints: a second one is refused at its start, and told who holds it.

The file LEASE names the job's process. On the same machine the kernel says whether that still lives; from any other
the holder is known by its beats, which the newcomer watches for by its own clock: clocks are never compared. The lease
tells two people of their mistake in time; that nothing is lost where it errs is the fence's part (see `fence`).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..agent.records import Process, hostname
from ..errors import CheckpointError
from .files import Folder, open_folder

LEASE = "LEASE"
BEAT_SECONDS, PATIENCE_SECONDS = 10.0, 35.0
_MOST_BYTES = 10_000


class RootHeld(CheckpointError):
    """Another job that lives works under this root."""

    retry = False


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A job, as LEASE tells of it."""

    run: str
    nonce: str  # of the attempt
    process: Process  # lives as long as the job does: what starts its attempts, or rank 0 alone
    place: str  # where that process number means this process
    since: float  # Unix time by the holder's clock; for people
    group: str = ""  # of processes on several machines that are one job; empty: none

    @classmethod
    def here(cls, *, run: str, nonce: str, pid: int, group: str = "") -> Holder:
        """A job of this machine."""
        return cls(run=run, nonce=nonce, process=Process.of(pid), place=_place(), since=time.time(), group=group)

    def same_job(self, other: Holder) -> bool:
        """True for another attempt of one job."""
        if self.group and self.group == other.group:
            return True
        return (self.place, self.process) == (other.place, other.process)

    def to_bytes(self, beat: int = 0) -> bytes:
        """As it stands in the file."""
        return json.dumps({**asdict(self), "beat": beat}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder | None:
        """What a file tells; None where it cannot be understood."""
        try:
            values: dict[str, Any] = json.loads(data)
            del values["beat"]
            found = cls(**{**values, "process": Process(**values["process"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        words = (found.run, found.nonce, found.place, found.group)
        sound = all(isinstance(word, str) for word in words) and type(found.since) is float
        return found if sound and 0 <= found.since < 1 << 40 else None

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"run {self.run} (pid {self.process.pid} on {self.process.host}, since {since} by its clock)"


class Lease:
    """Held until `close`, or until the job's process is no more."""

    def __init__(self, folder: Folder, holder: Holder, *, beat_seconds: float) -> None:
        self._folder, self._holder, self._beat_seconds = folder, holder, beat_seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="checkpoint-lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give it back, unless another has taken it over."""
        self._closing.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # of any storage library: a lease of a job that is gone holds nobody up
            if self._ours():
                self._folder.delete(LEASE)

    def _beat(self) -> None:
        number = 0
        while not self._closing.wait(self._beat_seconds):
            number += 1
            with contextlib.suppress(Exception):  # of any storage library: the next beat may come through
                if not self._ours():
                    return
                self._folder.touch(LEASE, self._holder.to_bytes(number))

    def _ours(self) -> bool:
        found = Holder.from_bytes(self._folder.read(LEASE, most=_MOST_BYTES))
        return found is not None and found.nonce == self._holder.nonce


def take_lease(
    root: str, holder: Holder, *, beat_seconds: float = BEAT_SECONDS, patience_seconds: float = PATIENCE_SECONDS
) -> Lease:
    """Make this job the one that works under the root.

    Raises RootHeld where another one lives; CheckpointError where the storage fails.
    """
    folder = open_folder(root)
    try:
        folder.make()
        _refuse_second(folder, holder, patience_seconds)
        folder.publish(LEASE, holder.to_bytes())
    except CheckpointError:
        raise
    except Exception as error:  # of any storage library
        raise CheckpointError(f"{folder.url} could not be leased: {type(error).__name__}: {error}") from error
    return Lease(folder, holder, beat_seconds=beat_seconds)


def _refuse_second(folder: Folder, newcomer: Holder, patience_seconds: float) -> None:
    try:
        stamp = folder.stamp(LEASE)
        found = Holder.from_bytes(folder.read(LEASE, most=_MOST_BYTES))
    except FileNotFoundError:
        return
    if found is not None and found.same_job(newcomer):
        return
    if found is not None and found.place == newcomer.place:
        lives = found.process.alive
    else:
        lives = _beats(folder, stamp, patience_seconds)
    if lives:
        raise RootHeld(
            f"{folder.url} is in use by {found or 'a job that cannot be told'}: two jobs would delete each other's "
            "checkpoints; stop that one, or give this one a run folder or checkpoint.path of its own"
        )


def _beats(folder: Folder, stamp: str, seconds: float) -> bool:
    """True when the lease changes within that time, by the clock of this process."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, seconds / 50))
        try:
            if folder.stamp(LEASE) != stamp:
                return True
        except FileNotFoundError:
            return False  # given back
    return False


def _place() -> str:
    """Differs between two machines, two boots of one, and two containers with processes of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return hostname()
