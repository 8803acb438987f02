"""Nodes of a Ray cluster, or a private Ray on this machine: one agent in each bundle of a placement group."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unitrain.agent.job import FILE, job_text
from unitrain.agent.local_job import STATE, OneProcess
from unitrain.agent.logs import attempt_number, find_log, log_lines, new_attempt, no_log
from unitrain.agent.records import EXIT, read_record, write_exit, write_record
from unitrain.agent.screen import say
from unitrain.errors import ExitCode, UnitrainError, UserError
from unitrain.launcher import Job, JobStatus, Launcher, Rendered
from unitrain.launchers import _ray_options
from unitrain.launchers._hosts import chosen_variables
from unitrain.launchers._ray_jobs import ENDED, Jobs, NotReached
from unitrain.launchers._ray_options import DRIVER, FOLDER, STOP, WAITING, Plan
from unitrain.recipe import Recipe
from unitrain.redaction import speaks_of_secrets
from unitrain.strategy import Problem
from unitrain.world import environment

OPTIONS = _ray_options.OPTIONS
STOP_SECONDS = 60.0  # for the cluster to end a job that it was told to stop
_POLL_SECONDS = 0.2
_CANCELLED = 128 + signal.SIGTERM
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nobody is told
    "RAY_memory_monitor_refresh_ms": "0",  # on a machine that is not its own it would end ranks for others' memory
}


class Ray(Launcher):
    """The job is a driver: a process of this machine with a Ray of its own, or a job of a running cluster."""

    name = "ray"

    def __init__(self) -> None:
        self._private, self._running = PrivateRay(), RunningRay()

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """Options that it does not know or cannot use."""
        return _ray_options.problems(recipe)

    def render(self, job: Job) -> Rendered:
        """The job for the agents, the plan for the driver, and the command that runs the driver."""
        return self._way(job).render(job)

    def submit(self, job: Job, rendered: Rendered) -> str:
        """Start the driver here, or hand it to the cluster."""
        return self._way(job).submit(job, rendered)

    def wait(self, job: Job, job_id: str) -> int:
        """The run's exit code, with rank 0's output until then."""
        return self._way(job).wait(job, job_id)

    def status(self, run_dir: Path, job_id: str) -> JobStatus:
        """From the driver's process, or from the cluster and from what the agents have left."""
        return self._way_of(run_dir).status(run_dir, job_id)

    def logs(self, run_dir: Path, *, rank: int = 0, follow: bool = False) -> Iterator[str]:
        """From the files that the ranks of all nodes write into the run's folder."""
        return self._way_of(run_dir).logs(run_dir, rank=rank, follow=follow)

    def cancel(self, run_dir: Path, job_id: str, *, grace_seconds: float = 30.0) -> None:
        """Have the agents stop, and end what is still there after the grace."""
        self._way_of(run_dir).cancel(run_dir, job_id, grace_seconds=grace_seconds)

    def _way(self, job: Job) -> Launcher:
        return self._private if job.options.get("address") is None else self._running

    def _way_of(self, run_dir: Path) -> Launcher:
        return self._private if "address" not in (read_record(run_dir / STATE) or {}) else self._running


class PrivateRay(OneProcess):
    """The driver is a process beside us, and its Ray ends with it."""

    name = Ray.name

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """See Ray."""
        return Ray.problems(recipe)

    def render(self, job: Job) -> Rendered:
        """See Ray."""
        plan = Plan.of(job)
        detached = ("--detached",) if job.options.get("detached") else ()
        argv = (sys.executable, "-m", DRIVER, str(job.run_dir), *detached)
        return Rendered(files={FILE: job_text(job, self.name), _ray_options.FILE: plan.text}, argv=argv, environ=_QUIET)


class RunningRay(Launcher):
    """The driver is a job of a cluster, which does not need us any more."""

    name = Ray.name

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """See Ray."""
        return Ray.problems(recipe)

    def render(self, job: Job) -> Rendered:
        """See Ray."""
        plan = Plan.of(job)
        files = {FILE: job_text(job, self.name), _ray_options.FILE: plan.text}
        return Rendered(files=files, argv=(plan.python, "-m", DRIVER, str(job.run_dir)))

    def submit(self, job: Job, rendered: Rendered) -> str:
        """Write the files and hand the driver to the cluster."""
        run_dir, plan = job.run_dir, Plan.of(job)
        assert plan.address is not None, "or the driver would run beside us"
        try:
            variables = chosen_variables(plan.environment, environment())
        except ValueError as error:
            raise UserError(f"{error}; set it, or take it out of the list") from error
        if secret := [name for name in variables if speaks_of_secrets(name)]:
            raise UserError(
                f"launcher.options.environment takes in {', '.join(secret)}, and Ray shows a job's variables to all "
                "its users; name the variables one by one, without these"
            )
        for path, content in rendered.files.items():
            (run_dir / path).write_text(content)
        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        (folder / STOP).unlink(missing_ok=True)
        (run_dir / EXIT).unlink(missing_ok=True)
        attempt = attempt_number(new_attempt(run_dir))
        try:
            job_id = Jobs(plan.address, plan.ca_file).submit(
                plan.submission_id, entrypoint=plan.entrypoint, variables=variables, run=job.run_id
            )
        except NotReached as error:
            raise UserError(f"{error}; set launcher.options.address to that of its dashboard") from error
        state: dict[str, Any] = {"launcher": self.name, "job_id": job_id, "submitted": time.time(), "attempt": attempt}
        write_record(run_dir / STATE, **state, address=plan.address, ca_file=plan.ca_file)
        return job_id

    def wait(self, job: Job, job_id: str) -> int:
        """Follow rank 0's log until the job has ended."""
        watch = _Watch(job.run_dir, job_id, aloud=True)
        since = _state(job.run_dir, job_id)["attempt"]
        for line in log_lines(lambda: find_log(job.run_dir, 0, since_attempt=since), watch.ended, follow=True):
            print(line, flush=True)
        status = watch.status
        if status.state not in ("done", "preempted"):
            say(f"job {job_id} {status.state}; what its agents said: {job.run_dir / 'logs'}/agent-*.log")
            say(status.detail)
        return ExitCode.FAILED if status.exit_code is None else status.exit_code

    def status(self, run_dir: Path, job_id: str) -> JobStatus:
        """From the cluster, and for how it ended from what the agents have left."""
        state = _state(run_dir, job_id)
        left = read_record(run_dir / EXIT)
        try:
            seen = _jobs(state).look(job_id)
        except UnitrainError as error:
            if left is None:
                return JobStatus("unknown", detail=str(error))
            seen = None
        said = "the cluster has forgotten it" if seen is None else str(seen.get("status"))
        if seen is not None and said not in ENDED:
            waiting = _content(run_dir / FOLDER / WAITING)
            if said == "PENDING" or waiting:
                return JobStatus("pending", detail=f"waiting {waiting or 'for its driver to start'}")
            return JobStatus("running", detail=f"Ray job {job_id}")
        if left is not None:
            return job_status_of(left, run_dir)
        if "cancelled" in state or said == "STOPPED":
            return JobStatus("cancelled", _CANCELLED, "stopped by SIGTERM")
        return JobStatus("failed", detail=said if seen is None else why_failed(seen, run_dir))

    def logs(self, run_dir: Path, *, rank: int = 0, follow: bool = False) -> Iterator[str]:
        """See Ray."""
        state = _state(run_dir)
        watch = _Watch(run_dir, state["job_id"])
        running = not watch.ended()
        since = state["attempt"] if running else 0
        if not running and find_log(run_dir, rank) is None:
            raise no_log(run_dir, rank)
        return log_lines(lambda: find_log(run_dir, rank, since_attempt=since), watch.ended, follow=follow and running)

    def cancel(self, run_dir: Path, job_id: str, *, grace_seconds: float = 30.0) -> None:
        """Ask through the run's folder, so that ranks can save; Ray's own stop gives them three seconds."""
        state = _state(run_dir, job_id)
        if (seen := _jobs(state).look(job_id)) is None or seen.get("status") in ENDED:
            return
        write_record(run_dir / STATE, **{**state, "cancelled": time.time()})
        (run_dir / FOLDER / STOP).write_text(str(int(signal.SIGTERM)))
        if not _ends(state, job_id, grace_seconds):
            _jobs(state).stop(job_id)
            if not _ends(state, job_id, STOP_SECONDS):
                raise UnitrainError(f"job {job_id} still runs {STOP_SECONDS:g} s after the cluster was told to stop it")
        if read_record(run_dir / EXIT) is None:  # no agent could say so itself
            write_exit(run_dir, _CANCELLED)


class _Watch:
    """Asks for a job's state now and then."""

    def __init__(self, run_dir: Path, job_id: str, *, aloud: bool = False) -> None:
        self._run_dir, self._job_id, self._aloud = run_dir, job_id, aloud
        self.status = JobStatus("unknown")
        self._next, self._pause, self._left = 0.0, _POLL_SECONDS, False

    def ended(self) -> bool:
        """True once the job is over."""
        left = (self._run_dir / EXIT).exists()
        if left != self._left:  # it is about to end
            self._left, self._next, self._pause = left, 0.0, _POLL_SECONDS
        if time.monotonic() >= self._next:
            before, self.status = self.status, RunningRay().status(self._run_dir, self._job_id)
            if self._aloud and self.status.state in ("pending", "unknown") and before != self.status:
                say(f"job {self._job_id} is {self.status.state}: {self.status.detail}")
            self._next = time.monotonic() + self._pause
            self._pause = min(self._pause * 1.5, 5.0)
        return self.status.state not in ("pending", "running", "unknown")


def job_status_of(left: dict[str, Any], run_dir: Path) -> JobStatus:
    """From how the run ended by its own record."""
    code = left.get("exit_code")
    if type(code) is not int:
        raise UserError(f"{run_dir / EXIT} is damaged: its exit code is {str(code)[:40]!r}")
    if 128 < code < 128 + signal.NSIG:
        return JobStatus("cancelled", code, f"stopped by {signal.Signals(code - 128).name}")
    states: dict[int, str] = {ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted"}
    return JobStatus(states.get(code, "failed"), code, str(left.get("error", "")))


def why_failed(seen: Mapping[str, Any], run_dir: Path) -> str:
    """What a job of the cluster has died of whose driver could not say it."""
    code = seen.get("driver_exit_code")
    if code in (126, 127):
        python = Plan.read(run_dir).python
        return f"the cluster has no Python {python}; name one that it has by launcher.options.python"
    if type(code) is int and (code < 0 or code > 128) and (number := abs(code) % 128) in list(signal.Signals):
        return f"its driver was ended by {signal.Signals(number).name}, and all ranks with it"
    # the end of the driver's log
    last = str(seen.get("message") or "").strip().rpartition("\n")[2]
    return last or f"its driver has left no exit code ({seen.get('status')})"


def _ends(state: dict[str, Any], job_id: str, seconds: float) -> bool:
    """Wait so long for the job's end; whether it came."""
    deadline = time.monotonic() + seconds
    while (seen := _jobs(state).look(job_id)) is not None and seen.get("status") not in ENDED:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _jobs(state: dict[str, Any]) -> Jobs:
    return Jobs(state["address"], state.get("ca_file"))


def _state(run_dir: Path, job_id: str | None = None) -> dict[str, Any]:
    """launcher, job_id, submitted (Unix time), attempt, address, and cancelled (Unix time) once somebody did.

    Raises UserError where there is no such job.
    """
    state = read_record(run_dir / STATE)
    if state is None:
        raise UserError(f"no job was started in {run_dir}; start one with unitrain launch")
    kinds = {"job_id": str, "submitted": float, "attempt": int, "address": str}
    if odd := [key for key, kind in kinds.items() if type(state.get(key)) is not kind]:
        raise UserError(f"{run_dir / STATE} is damaged: it has no {' and no '.join(odd)}; start the run anew")
    if job_id is not None and state["job_id"] != job_id:
        raise UserError(f"{run_dir} has no job {job_id!r}; its newest is {state['job_id']}")
    return state


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
