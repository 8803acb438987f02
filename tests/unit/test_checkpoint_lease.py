"""Of two live jobs under one root the second is refused and told of the first; a dead one holds nobody up."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from unitrain.agent.records import Process
from unitrain.checkpoint import Holder, take_lease
from unitrain.checkpoint.lease import LEASE, RootHeld
from unitrain.errors import CheckpointError

ELSEWHERE = {"place": "another machine", "process": Process(77, "far.example", "1")}


def holder(nonce: str, pid: int | None = None, **changes: Any) -> Holder:
    own = Holder.here(run=f"run-{nonce}", nonce=nonce, pid=os.getpid() if pid is None else pid)
    return dataclasses.replace(own, **changes)


@pytest.fixture
def sleeper() -> Any:
    """A process of another job."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def test_the_second_job_is_refused_and_told_who_holds_the_first(tmp_path: Path, sleeper: Any) -> None:
    first = take_lease(str(tmp_path), holder("a", sleeper.pid))
    said = rf"is in use by run run-a \(pid {sleeper.pid} on {os.uname().nodename}, since 20\d\d-.*stop that one"
    with pytest.raises(RootHeld, match=said):
        take_lease(str(tmp_path), holder("b"))
    assert json.loads((tmp_path / LEASE).read_text())["nonce"] == "a", "the first is not disturbed"
    first.close()
    assert not (tmp_path / LEASE).exists()
    take_lease(str(tmp_path), holder("b")).close()


def test_a_job_that_was_killed_holds_nobody_up(tmp_path: Path, sleeper: Any) -> None:
    dead = take_lease(str(tmp_path), holder("a", sleeper.pid))
    sleeper.kill()
    sleeper.wait()
    began = time.monotonic()
    mine = take_lease(str(tmp_path), holder("b"))
    assert time.monotonic() - began < 5, "the kernel says so at once"
    dead.close()
    assert json.loads((tmp_path / LEASE).read_text())["nonce"] == "b", "a lease that was taken over is left alone"
    mine.close()


def test_the_next_attempt_of_a_job_is_let_in(tmp_path: Path) -> None:
    first = take_lease(str(tmp_path), holder("a"))
    second = take_lease(str(tmp_path), holder("b"))
    first.close()
    assert json.loads((tmp_path / LEASE).read_text())["nonce"] == "b"
    second.close()
    far = take_lease(str(tmp_path), holder("c", group="torchrun-5", **ELSEWHERE))
    take_lease(str(tmp_path), holder("d", group="torchrun-5")).close()
    far.close()


def test_a_number_that_another_process_has_now_is_not_the_job(tmp_path: Path) -> None:
    own = Process.of(os.getpid())
    earlier = dataclasses.replace(own, started=str(int(own.started) - 1))
    take_lease(str(tmp_path), holder("a", process=earlier))
    take_lease(str(tmp_path), holder("b")).close()


@pytest.mark.parametrize("beats", [True, False])
@pytest.mark.parametrize("root", ["{}", "memory://{}"])
def test_a_job_of_another_machine_is_known_by_its_beats(tmp_path: Path, root: str, beats: bool) -> None:
    """Its clock says 1970, and this machine's clock is never asked."""
    root = root.format(tmp_path)
    far = take_lease(root, holder("a", since=0.0, **ELSEWHERE), beat_seconds=0.02 if beats else 60)
    if beats:
        with pytest.raises(RootHeld, match=r"run-a \(pid 77 on far.example, since 19"):
            take_lease(root, holder("b"), patience_seconds=10)
    else:
        take_lease(root, holder("b"), patience_seconds=0.3).close()
    far.close()


def test_a_newcomer_that_waits_goes_on_when_the_lease_is_given_back(tmp_path: Path) -> None:
    far = take_lease(str(tmp_path), holder("a", **ELSEWHERE), beat_seconds=60)
    threading.Timer(0.2, far.close).start()
    take_lease(str(tmp_path), holder("b"), patience_seconds=30).close()


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff", b"[" * 3000, b'{"beat": 1}', b'{"beat": 1, "process": {"pid": -1}}']
)
def test_a_lease_that_says_nothing_holds_nobody_up_for_long(tmp_path: Path, text: bytes) -> None:
    (tmp_path / LEASE).write_bytes(text)
    take_lease(str(tmp_path), holder("b"), patience_seconds=0.1).close()


def test_a_lease_that_is_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / LEASE).mkdir()
    with pytest.raises(CheckpointError, match="could not be leased: IsADirectoryError"):
        take_lease(str(tmp_path), holder("b"), patience_seconds=0.1)


def test_a_beat_never_takes_a_lease_back(tmp_path: Path) -> None:
    first = take_lease(str(tmp_path), holder("a"), beat_seconds=0.01)
    second = take_lease(str(tmp_path), holder("b"), beat_seconds=60)
    time.sleep(0.1)
    before = (tmp_path / LEASE).stat().st_mtime_ns
    time.sleep(0.1)
    assert (tmp_path / LEASE).stat().st_mtime_ns == before
    first.close()
    second.close()
