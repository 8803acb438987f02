"""A job that is one process of this machine: started once, found again and ended from any shell."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ExitCode, UserError
from ..launcher import Job, JobStatus, Launcher, Rendered
from .logs import attempt_number, find_log, log_lines, new_attempt, no_log
from .records import EXIT, Process, read_record, write_exit, write_record
from .signals import STOPPING
from .threads import thread_defaults

STATE = "job-state.json"  # which process is the job, since when, and whether somebody cancelled it
_POLL_SECONDS = 0.05
_STOPPED = {128 + number: number.name for number in STOPPING}


class OneProcess(Launcher):
    """A launcher whose job is one process of this machine, which holds all that the job is: its id is the pid."""

    def __init__(self) -> None:
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def submit(self, job: Job, rendered: Rendered) -> str:
        """Start the process."""
        process = start_job(job, rendered, self.name, detached=bool(job.options.get("detached")))
        job_id = str(process.pid)
        self._started[job_id] = process
        return job_id

    def wait(self, job: Job, job_id: str) -> int:
        """The exit code of the process, which shows rank 0's log itself unless it is detached."""
        process = self._started.pop(job_id, None)
        if process is None:
            return wait_until_ended(job.run_dir, job_id)
        if job.options.get("detached"):
            self.show_log(job)
            return process.wait()
        code, _ = wait_for(process)
        return code if code >= 0 else ExitCode.FAILED  # it was killed

    def show_log(self, job: Job) -> None:
        """Print rank 0's log until the job ends; nothing where it ended before any rank had a log."""
        with contextlib.suppress(UserError):
            for line in self.logs(job.run_dir, follow=True):
                print(line, flush=True)

    def status(self, run_dir: Path, job_id: str) -> JobStatus:
        """From the process and what it has left."""
        return job_status(run_dir, job_id)

    def logs(self, run_dir: Path, *, rank: int = 0, follow: bool = False) -> Iterator[str]:
        """From the files that the ranks write."""
        return job_log(run_dir, rank=rank, follow=follow)

    def cancel(self, run_dir: Path, job_id: str, *, grace_seconds: float = 30.0) -> None:
        """End the process, which has its ranks save and ends them."""
        cancel_job(run_dir, job_id, grace_seconds=grace_seconds)


def start_job(job: Job, rendered: Rendered, launcher: str, *, detached: bool = False) -> subprocess.Popen[bytes]:
    """Write the files and start the command; it shares our terminal unless detached."""
    run_dir = job.run_dir
    for name, content in rendered.files.items():
        (run_dir / name).write_text(content)
    (run_dir / EXIT).unlink(missing_ok=True)
    state = {"launcher": launcher, "submitted": time.time(), "attempt": attempt_number(new_attempt(run_dir))}
    with contextlib.ExitStack() as stack:
        output: Any = None
        if detached:
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


def wait_for(process: subprocess.Popen[bytes], *, understands: Collection[int] = STOPPING) -> tuple[int, int | None]:
    """The exit code of a job that we started, and the signal, if any, that we got meanwhile and passed on.

    What the job's own agent does not understand is passed on as SIGTERM.
    """
    with _forwarded_to(process, understands) as caught:
        return process.wait(), caught[0] if caught else None


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
    found = ended.get("exit_code")
    if type(found) is not int:
        raise UserError(f"{run_dir / EXIT} is damaged: its exit code is {str(found)[:40]!r}")
    code: Any = found
    if code in _STOPPED:
        return JobStatus("cancelled", code, f"stopped by {_STOPPED[code]}")
    states = {ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted"}
    return JobStatus(states.get(code, "failed"), code, str(ended.get("error", "")))


def job_log(run_dir: Path, *, rank: int, follow: bool) -> Iterator[str]:
    """Lines of one rank's log, newest attempt; with `follow` until the job ends. Raises UserError for no such log."""
    state = job_state(run_dir)
    running = job_status(run_dir, state["job_id"]).state == "running"
    since = state["attempt"] if running else 0
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
    write_record(run_dir / STATE, **{**job_state(run_dir), "cancelled": time.time()})
    os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while process.alive:
        if time.monotonic() > deadline:
            os.kill(process.pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(_POLL_SECONDS)
    if read_record(run_dir / EXIT) is None:  # it could not say so itself
        write_exit(run_dir, 128 + signal.SIGTERM)


def job_state(run_dir: Path) -> dict[str, Any]:
    """launcher, job_id, submitted (Unix time), attempt, process, and cancelled (Unix time) once somebody did.

    Raises UserError where no job was ever started.
    """
    state = read_record(run_dir / STATE)
    if state is None:
        raise UserError(f"no job was started in {run_dir}; start one with unitrain launch")
    kinds = {"job_id": str, "submitted": float, "attempt": int, "process": dict}
    if odd := [key for key, kind in kinds.items() if type(state.get(key)) is not kind]:
        raise UserError(f"{run_dir / STATE} is damaged: it has no {' and no '.join(odd)}; start the run anew")
    return state


def _process(run_dir: Path, job_id: str) -> Process:
    state = job_state(run_dir)
    if state["job_id"] != job_id:
        raise UserError(f"{run_dir} has no job {job_id!r}; its newest is {state['job_id']}")
    try:
        return Process(**state["process"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{run_dir / STATE} is damaged: {error}; start the run anew") from error


@contextlib.contextmanager
def _forwarded_to(process: subprocess.Popen[bytes], understands: Collection[int]) -> Iterator[list[int]]:
    """Pass signals on: a terminal sends them to the job as well, but `kill` and `docker stop` do not."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def forward(number: int, frame: object) -> None:
        caught.append(number)
        process.send_signal(number if number in understands else signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
