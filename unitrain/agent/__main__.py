"""The command line of the agent, one on each node: `python -m unitrain.agent RUN_DIR [--node N --meet HOST:PORT]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import ExitCode, UnitrainError, UserError
from .follow import Follower
from .job import AgentJob, read_job
from .rank import die_with
from .screen import screen_for
from .starters import Spawn, Starter, Warm
from .supervise import Agent
from .team import Leader, Member, meeting_place
from .threads import thread_defaults
from .wire import make_key, read_key


def main() -> int:
    """Run the job of a run's folder on this node; the run's exit code."""
    parser = argparse.ArgumentParser(prog="python -m unitrain.agent", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's folder, with its job.json")
    parser.add_argument("--node", type=int, default=0, help="number of this node, from 0")
    parser.add_argument("--meet", metavar="HOST:PORT", help="where node 0 listens for the agents of the other nodes")
    parser.add_argument("--detached", action="store_true", help="go on when the process that started this one ends")
    parser.add_argument("--join-seconds", type=float, metavar="SECONDS", help="in place of the run's own join_seconds")
    known = parser.parse_args()
    if not known.detached:
        die_with(os.getppid(), signal.SIGTERM)
    try:
        return _serve(known.run_dir, known.node, known.meet, known.join_seconds)
    except UnitrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception:
        traceback.print_exc()  # ours; the launcher must still see a failed run, and not Python's exit code 1
        return ExitCode.FAILED


def _serve(run_dir: Path, node: int, meet: str | None, join_seconds: float | None) -> int:
    job = read_job(run_dir)
    if join_seconds is not None:
        job = replace(job, join_seconds=join_seconds)
    if not 0 <= node < job.nodes:
        raise UserError(f"--node is {node}; the run has nodes 0 to {job.nodes - 1}")
    if job.nodes > 1 and meet is None:
        raise UserError(f"the run has {job.nodes} nodes; say where they meet: --meet HOST:PORT of node 0")

    def choose(logs: Path) -> Sequence[Starter]:
        return choose_starters(job, run_dir, logs)

    if job.nodes == 1 or meet is None:
        return Agent(job, run_dir, screen_for(job.run_id)).run(choose)
    host, port = meeting_place(meet)
    if node == 0:
        return Agent(job, run_dir, screen_for(job.run_id), team=Leader(job, host, port, make_key(run_dir))).run(choose)
    return Follower(job, run_dir, Member(job, host, port, read_key(run_dir, job.join_seconds), node=node)).run(choose)


def choose_starters(job: AgentJob, run_dir: Path, logs: Path) -> Sequence[Starter]:
    """Forks of a warm process where the framework allows it, and new processes where it does not."""
    arguments, defaults = [str(run_dir)], thread_defaults(job.nproc)
    spawn = Spawn(job.entry, arguments, defaults)
    if not job.fork:
        return [spawn]
    return [Warm(job.preload, job.entry, arguments, defaults, logs / "warm.log"), spawn]


if __name__ == "__main__":
    sys.exit(main())
