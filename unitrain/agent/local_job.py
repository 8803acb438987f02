"""A job that is one process of this machine: started once, found again and ended from any shell."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ExitCode, UserError
from ..launcher import Job, JobStatus, Rendered
from .logs import attempt_folders, attempt_number, find_log, log_lines, no_log
from .records import EXIT, Process, read_record, write_exit, write_record
from .threads import thread_defaults

STATE = "job-state.json"  # which process is the job, since when, and whether somebody cancelled it
_POLL_SECONDS = 0.05
_STOPPED = {128 + number: signal.Signals(number).name for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}


def start_job(job: Job, rendered: Rendered, launcher: str, *, detached: bool = False) -> subprocess.Popen[bytes]:
    """Write the files and start the command; it shares our terminal unless detached."""
    run_dir = job.run_dir
    for name, content in rendered.files.items():
        (run_dir / name).write_text(content)
    (run_dir / EXIT).unlink(missing_ok=True)
    folders = attempt_folders(run_dir)
    state = {"launcher": launcher, "submitted": time.time(), "first_attempt": attempt_number(folders[-1]) + 1 if folders else 0}
    with contextlib.ExitStack() as stack:
        output: Any = None
        if detached:
            (run_dir / "logs").mkdir(exist_ok=True)
            output = stack.enter_context((run_dir / "logs" / "agent.log").open("ab"))
        process = subprocess.Popen(
            rendered.argv,
            env={**thread_defaults(job.nproc), **os.environ, **rendered.environ},
            stdin=subprocess.DEVNULL if detached else None,
            stdout=output,
            stderr=output,
            start_new_session=detached,
        )
    write_record(run_dir / STATE, **state, job_id=str(process.pid), process=asdict(Process.of(process.pid)))
    return process


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a job that we started. Signals that we get meanwhile are the job's."""
    with _forwarded_to(process):
        return process.wait()


def wait_until_ended(run_dir: Path, job_id: str) -> int:
    """The exit code of a job that another process started."""
    while (status := job_status(run_dir, job_id)).state == "running":
        time.sleep(_POLL_SECONDS)
    return ExitCode.FAILED if status.exit_code is None else status.exit_code


def job_status(run_dir: Path, job_id: str) -> JobStatus:
    """What became of the job."""
    process = _process(run_dir, job_id)
    if process.alive:
        return JobStatus("running", detail=f"pid {process.pid}")
    ended = read_record(run_dir / EXIT)
    if ended is None and not process.here:
        return JobStatus("unknown", detail=f"it was started on {process.host}; ask there")
    if ended is None:
        return JobStatus("failed", detail=f"its process {process.pid} is gone and has left no exit code")
    code = ended["exit_code"]
    if code in _STOPPED:
        return JobStatus("cancelled", code, f"stopped by {_STOPPED[code]}")
    states = {ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted"}
    return JobStatus(states.get(code, "failed"), code, ended.get("error", ""))


def job_log(run_dir: Path, *, rank: int, follow: bool) -> Iterator[str]:
    """Lines of one rank's log, newest attempt; with `follow` until the job ends. Raises UserError for no such log."""
    state = read_record(run_dir / STATE) or {"job_id": ""}
    running = bool(state["job_id"]) and job_status(run_dir, state["job_id"]).state == "running"
    since = state["first_attempt"] if running else 0
    if not running and find_log(run_dir, rank) is None:
        raise no_log(run_dir, rank)
    return log_lines(
        lambda: find_log(run_dir, rank, since_attempt=since),
        lambda: job_status(run_dir, state["job_id"]).state != "running",
        follow=follow and running,
    )


def cancel_job(run_dir: Path, job_id: str, *, grace_seconds: float) -> None:
    """SIGTERM to the job's process, and SIGKILL when it is still there after the grace."""
    process = _process(run_dir, job_id)
    if not process.here:
        raise UserError(f"the job was started on {process.host}; cancel it there")
    if not process.alive:
        return
    state = read_record(run_dir / STATE) or {}
    write_record(run_dir / STATE, **{**state, "cancelled": time.time()})
    os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while process.alive:
        if time.monotonic() > deadline:
            os.kill(process.pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(_POLL_SECONDS)
    if read_record(run_dir / EXIT) is None:  # it could not say so itself
        write_exit(run_dir, 128 + signal.SIGTERM)


def was_cancelled(run_dir: Path) -> bool:
    """True when somebody has cancelled the job since it was started."""
    return "cancelled" in (read_record(run_dir / STATE) or {})


def _process(run_dir: Path, job_id: str) -> Process:
    state = read_record(run_dir / STATE)
    if state is None or state["job_id"] != job_id:
        newest = f"; its newest job is {state['job_id']}" if state else ""
        raise UserError(f"{run_dir} has no job {job_id!r}{newest}")
    return Process(**state["process"])


@contextlib.contextmanager
def _forwarded_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on: a terminal sends them to the job as well, but `kill` and `docker stop` do not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda caught, frame: process.send_signal(caught)) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
