"""What Slurm knows of a job, by the text of squeue and sacct: their JSON differs from version to version."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unitrain.errors import ExitCode, UnitrainError, UserError
from unitrain.launcher import JobStatus

_ANSWER_SECONDS = 60.0

WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNNING = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "SUSPENDED", "STOPPED", "RESIZING"}

# Slurm's reasons in words; others stand as they are.
REASONS = {
    "Resources": "waits for nodes that others use",
    "Priority": "other jobs come first",
    "BeginTime": "may not start yet; after a requeue Slurm waits for a moment",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "the job that it waits for failed: it will never start",
    "JobHeldUser": "held; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "PartitionNodeLimit": "the partition has not so many nodes: it will not start",
    "PartitionTimeLimit": "the time is more than the partition allows: it will not start",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs now",
    "PartitionConfig": "the partition does not allow what it asks for: it will not start",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "Nodes": "nodes that it needs are down or reserved",
    "NodeDown": "a node is down",
    "BadConstraints": "no node has the features that it asks for: it will not start",
    "Reservation": "waits for its reservation",
    "Licenses": "waits for licenses",
    "InvalidAccount": "the account is not valid: it will not start",
    "InvalidQOS": "the quality of service is not valid: it will not start",
    "JobArrayTaskLimit": "as many of its array run as may",
    "launch_failed_requeued_held": "it could not be started and is held; see the node's log, then `scontrol release`",
}
ENDS = {
    "TIMEOUT": "the time limit came before it was saved; set launcher.options.warn_seconds to what a save takes",
    "NODE_FAIL": "a node failed, and the job was not requeued",
    "BOOT_FAIL": "a node did not boot",
    "OUT_OF_MEMORY": "it used more memory than it had asked for; see launcher.options.mem",
    "DEADLINE": "its deadline came",
    "LAUNCH_FAILED": "Slurm could not start it",
    "REVOKED": "another cluster took it",
}


@dataclass(frozen=True)
class Seen:
    """A job as Slurm sees it."""

    state: str  # in Slurm's words, such as RUNNING
    why: str = ""  # Slurm's reason, or the nodes
    exit_code: int | None = None

    @property
    def waiting(self) -> bool:
        """True while it is to start."""
        return self.state in WAITING

    @property
    def running(self) -> bool:
        """True while it has nodes."""
        return self.state in RUNNING

    @property
    def ended(self) -> bool:
        """True once it is over for good."""
        return not self.waiting and not self.running


class Queue:
    """Slurm's commands."""

    def look(self, job_id: str) -> Seen | None:
        """The job; None when Slurm no longer knows it. Raises UnitrainError where Slurm does not answer."""
        done = _run("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T|%N|%r")
        if done.returncode == 0 and done.stdout.strip():
            return read_squeue(done.stdout)
        if done.returncode and "Invalid job id" not in done.stderr:
            raise UnitrainError(f"squeue does not answer: {_last_line(done.stderr)}")
        done = _run(
            *("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}"),
            "--format=State,ExitCode,NodeList",
        )
        return read_sacct(done.stdout) if done.returncode == 0 else None  # 1: the site keeps no accounts

    def signal(self, job_id: str, name: str) -> None:
        """A signal to the agents, and not to the script; there may be none to get it."""
        _run("scancel", "--quiet", f"--signal={name}", job_id)

    def cancel(self, job_id: str) -> None:
        """End the job, whatever its state."""
        done = _run("scancel", job_id)
        if done.returncode and "Invalid job id" not in done.stderr and "already completing" not in done.stderr:
            raise UnitrainError(f"scancel {job_id} failed: {_last_line(done.stderr)}")

    def wait_for_change(self, job_id: str, before: Seen, *, until: float) -> Seen | None:
        """The job once it is no longer as it was, or at that time of time.monotonic()."""
        while (now := self.look(job_id)) == before and time.monotonic() < until:
            time.sleep(0.25)
        return now


def read_squeue(text: str) -> Seen:
    """From a line `state|nodes|reason`."""
    state, nodes, reason = (*text.strip().splitlines()[0].split("|", 2), "", "")[:3]
    return Seen(state, reason if state in WAITING else nodes)


def read_sacct(text: str) -> Seen | None:
    """From lines `state|exit code:signal|nodes`, of which the last is the newest start."""
    lines = text.strip().splitlines()
    if not lines:
        return None
    state, code, nodes = (*lines[-1].split("|"), "", "")[:3]
    number = code.partition(":")[0]
    return Seen(state.split()[0], nodes, int(number) if number.isdigit() else None)  # "CANCELLED by 0"


def status_of(seen: Seen | None, left: Mapping[str, Any] | None, *, cancelled: bool) -> JobStatus:
    """The state for people: Slurm's, and what the agents have left of how they ended."""
    code = left.get("exit_code") if left is not None else None
    code = code if type(code) is int else None
    error = str(left.get("error", "")) if left is not None else ""
    if seen is not None and seen.waiting:
        return JobStatus("pending", detail=_why(seen.why))
    if seen is not None and seen.running:
        return JobStatus("running", detail=f"{seen.state.lower()} on {seen.why}" if seen.why else seen.state.lower())
    if (cancelled and code != ExitCode.DONE) or (seen is not None and seen.state == "CANCELLED"):
        return JobStatus("cancelled", _CANCELLED_CODE if code is None else code, _how_cancelled(code))
    if seen is not None and seen.state in ENDS:
        return JobStatus("failed", code, error or ENDS[seen.state])
    if code is None and seen is not None:
        code = seen.exit_code
    if code is None:
        gone = "Slurm no longer knows the job" if seen is None else f"Slurm says {seen.state}"
        return JobStatus("failed", None, f"{gone}, and its agents have left no exit code")
    if code == ExitCode.DONE and (seen is None or seen.state == "COMPLETED"):
        return JobStatus("done", code)
    if code == ExitCode.PREEMPTED or (seen is not None and seen.state == "PREEMPTED"):
        return JobStatus("preempted", code, "stopped after a save, and not requeued")
    return JobStatus("failed", code, error or f"exit code {code}")


_CANCELLED_CODE = 143


def _how_cancelled(code: int | None) -> str:
    if code is None:
        return "before it began, or without time to save"
    return "stopped after a save" if code == ExitCode.PREEMPTED else "stopped by SIGTERM"


def _why(reason: str) -> str:
    reason = reason.strip("()")
    if reason == "None":
        return "Slurm has not looked at it yet"
    first = reason.partition(",")[0].split()[0] if reason else ""
    return f"{reason}: {REASONS[first]}" if first in REASONS else reason


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].partition("error: ")[2] or lines[-1] if lines else "without a word"


def _run(*argv: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
    except FileNotFoundError as error:
        raise UserError(f"there is no {argv[0]} here; ask on a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise UnitrainError(f"{argv[0]} has not answered for {_ANSWER_SECONDS:.0f} s") from error
