"""The first thing in a container: the run's files go to where the agent looks for them, and the agent starts.

`python -m unitrain.agent.unpack FROM RUN_DIR --job NAME --node N [--meet HOST:PORT]`, where FROM is a folder with
`recipe.yaml` and `job.json` (a mounted ConfigMap), RUN_DIR the run's folder on a volume that all nodes share, and NAME
the submission's own, so that a pod of an older one is told from this one's. A HOST named `shared` stands for node 0's
address as that leaves it in the run's folder: for clusters whose pods have no names.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import ExitCode, UnitrainError, UserError
from .job import FILE
from .records import EXIT, append_event, read_record, write_record

PLACED = "placed.json"  # whose files the folder holds, and where node 0 is
SHARED = "shared"
FINAL = (ExitCode.DONE, ExitCode.BAD_RECIPE, ExitCode.CRASH_LOOP)  # another start of the same job would change nothing
JOIN_SECONDS = 600.0
_POLL_SECONDS = 0.2
_KNOCK_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Become the agent of this node; an exit code where there is nothing left for it to do."""
    parser = argparse.ArgumentParser(prog="python -m unitrain.agent.unpack", description=__doc__)
    parser.add_argument("source", type=Path, metavar="FROM", help="the folder with the run's files")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's folder, seen by all nodes")
    parser.add_argument("--job", required=True, metavar="NAME", help="of this submission")
    parser.add_argument("--node", type=int, required=True, metavar="N", help="number of this node, from 0")
    parser.add_argument("--meet", metavar="HOST:PORT", help="where node 0 listens; the host `shared`: see its folder")
    known = parser.parse_args(arguments)
    # PID 1 has no default for it, and a node that only waits has nothing to save.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ExitCode.PREEMPTED))
    try:
        if known.node == 0:
            code = place(known.source, known.run_dir, known.job)
        else:
            code = wait_for_first(known.source, known.run_dir, known.job, known.meet)
        if code is not None:
            print(f"{known.job} has ended with exit code {code} already", file=sys.stderr)
            return code
        return become_agent(known.run_dir, known.node, known.meet)
    except UnitrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{known.run_dir} cannot be used: {error}; look at its volume", file=sys.stderr)
        return ExitCode.FAILED


def place(source: Path, run_dir: Path, job: str) -> int | None:
    """Node 0's part: copy the files unless that was done, and leave this node's address.

    The exit code of the run where it has ended for good.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    before = read_record(run_dir / PLACED) or {}
    if before.get("job") == job:
        if (code := ended(run_dir)) is not None:
            return code
    else:
        for path in sorted(source.iterdir()):
            if not path.name.startswith("..") and path.is_file():  # `..data` is how Kubernetes changes them at once
                _copy(path, run_dir / path.name)
        (run_dir / EXIT).unlink(missing_ok=True)
        append_event(run_dir, "placed", job=job)
    write_record(run_dir / PLACED, job=job, host=own_address(), time=time.time())
    return None


def wait_for_first(source: Path, run_dir: Path, job: str, meet: str | None) -> int | None:
    """What the other nodes do: wait until node 0 has placed the files and, where only the folder tells, answers.

    The exit code of the run where it has ended for good. Raises UnitrainError when the time is over.
    """
    seconds = _join_seconds(source)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        placed = read_record(run_dir / PLACED) or {}
        if placed.get("job") == job:
            if (code := ended(run_dir)) is not None:
                return code
            host, _, port = (meet or "").rpartition(":")
            if host != SHARED or _answers(str(placed.get("host", "")), int(port)):
                return None
        time.sleep(_POLL_SECONDS)
    raise UnitrainError(
        f"node 0 of {job} has left nothing in {run_dir} for {seconds:g} s: it has not started, or the volume is not "
        "one that all nodes share"
    )


def ended(run_dir: Path) -> int | None:
    """The exit code of a run that need not be started again."""
    code = (read_record(run_dir / EXIT) or {}).get("exit_code")
    return code if code in FINAL else None


def become_agent(run_dir: Path, node: int, meet: str | None) -> int:
    """Run the agent of this node; its exit code.

    In this process, which is the container's PID 1: in a new one, a SIGTERM before its handler is there would be lost.
    """
    from .__main__ import main as agent  # not before there is something to start

    words = [str(run_dir), "--node", str(node)]
    if meet is not None:
        host, _, port = meet.rpartition(":")
        if host == SHARED:
            host = str((read_record(run_dir / PLACED) or {}).get("host"))
        words += ["--meet", f"{host}:{port}"]
    sys.argv = ["unitrain.agent", *words]
    return agent()


def own_address() -> str:
    """Of this pod, as the others see it; empty where its name leads nowhere."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, proto=socket.IPPROTO_TCP)
    except OSError:
        return ""
    return str(found[0][4][0])


def _copy(path: Path, to: Path) -> None:
    """Whole or not at all. Another recipe than before is kept beside the new one."""
    text = path.read_bytes()
    if to.exists() and to.read_bytes() == text:
        return
    if to.exists() and to.name == "recipe.yaml":
        number = 1
        while (kept := to.with_name(f"recipe-{number}.yaml")).exists():
            number += 1
        to.replace(kept)
    draft = to.with_name(f".{to.name}.{os.getpid()}")
    draft.write_bytes(text)
    draft.replace(to)


def _join_seconds(source: Path) -> float:
    """As long as the agents wait for each other."""
    options = (read_record(source / FILE) or {}).get("options", {})
    found = options.get("join_seconds", JOIN_SECONDS) if isinstance(options, dict) else JOIN_SECONDS
    if type(found) not in (int, float) or not 0 < found < 1e9:
        raise UserError(f"join_seconds is {str(found)[:40]!r}, which is no time")
    return float(found)


def _answers(host: str, port: int) -> bool:
    """True when somebody listens there: an address that an earlier pod has left would lead nowhere."""
    try:
        socket.create_connection((host, port), timeout=_KNOCK_SECONDS).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
