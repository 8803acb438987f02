"""What failing ranks leave in the run's folder when no agent of ours listens, and how an attempt is then concluded."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from ..errors import ExitCode
from ..world import environment
from .local_job import job_state
from .logs import attempt_folders, rank_log
from .records import EVENTS, append_event, read_record, write_exit, write_record
from .report import Failure, failure_block, failure_exit_code, first_failure, keep_capsule, next_command
from .screen import say

FOLDER = "failures"


def leave_failure(run_dir: Path, account: dict[str, Any]) -> None:
    """Keep a rank's account of its failure (see `worker`)."""
    (run_dir / FOLDER).mkdir(exist_ok=True)
    write_record(run_dir / FOLDER / f"rank-{account['rank']}.json", **account)


def left_failures(run_dir: Path, since: float) -> list[Failure]:
    """The accounts that ranks have left since a moment (Unix time)."""
    attempt = attempt_folders(run_dir)[-1]
    accounts = [read_record(path) for path in sorted((run_dir / FOLDER).glob("rank-*.json"))]
    # Ranks of other hosts have another monotonic clock.
    return [
        Failure.from_message({**account, "monotonic": account["time"]}, rank_log(attempt, account["rank"]))
        for account in accounts
        if account is not None and account["time"] >= since
    ]


def conclude(run_dir: Path, code: int, caught: int | None) -> int:
    """Say how an attempt ended that an agent of another make ran, and keep it; our exit code for it.

    `code` is that agent's own, and `caught` the signal that stopped it, if one did.
    """
    state = job_state(run_dir)
    failures = left_failures(run_dir, state["submitted"])
    facts: dict[str, Any] = {}
    preempted = _preempted(run_dir, state["submitted"])
    if code == 0:
        ours: int = ExitCode.DONE
    elif preempted is not None:
        ours = preempted["exit_code"]
    elif caught is not None:
        ours = 128 + caught
    elif "cancelled" in state:
        ours = 128 + signal.SIGTERM
    elif not failures:
        ours = ExitCode.FAILED
    else:
        failure = first_failure(failures)
        ours = failure_exit_code(failure)
        facts = {"rank": failure.rank, "error": failure.error}
        capsule = keep_capsule(failure, run_dir, environment())
        append_event(run_dir, "fault", **facts)
    append_event(run_dir, "stop", exit_code=ours)
    write_exit(run_dir, ours, **facts)
    if ours == ExitCode.PREEMPTED:
        say(f"stopped after a save; {next_command(run_dir)}")
    if facts:
        say(failure_block(failure, run_dir, log_shown=failure.rank == 0, capsule=capsule))
    return ours


def _preempted(run_dir: Path, since: float) -> dict[str, Any] | None:
    """How the ranks ended, where they were asked to and did so by themselves."""
    last: dict[str, Any] | None = None
    for line in (run_dir / EVENTS).read_text().splitlines() if (run_dir / EVENTS).exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a crash
        if isinstance(event, dict) and event.get("event") in ("start", "preempt") and event.get("time", 0) >= since:
            last = event
    return last if last is not None and last["event"] == "preempt" else None
