"""The command line of the agent: `python -m unitrain.agent RUN_DIR`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ..errors import ExitCode, UnitrainError, UserError
from .job import AgentJob, read_job
from .rank import die_with
from .screen import screen_for
from .starters import Spawn, Starter, Warm
from .supervise import Agent
from .threads import thread_defaults


def main() -> int:
    """Run the job of a run's folder on this node; the run's exit code."""
    parser = argparse.ArgumentParser(prog="python -m unitrain.agent", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's folder, with its job.json")
    parser.add_argument("--node", type=int, default=0, help="number of this node, from 0")
    parser.add_argument("--detached", action="store_true", help="go on when the process that started this one ends")
    known = parser.parse_args()
    if not known.detached:
        die_with(os.getppid(), signal.SIGTERM)
    try:
        job = read_job(known.run_dir)
        if job.nodes != 1 or known.node != 0:
            raise UserError(f"node {known.node} of {job.nodes}: this agent serves one node; use the launcher torchrun")
        agent = Agent(job, known.run_dir, screen_for(job.run_id), node=known.node)
        return agent.run(lambda logs: choose_starters(job, known.run_dir, logs))
    except UnitrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception:
        traceback.print_exc()  # ours; the launcher must still see a failed run, and not Python's exit code 1
        return ExitCode.FAILED


def choose_starters(job: AgentJob, run_dir: Path, logs: Path) -> Sequence[Starter]:
    """Forks of a warm process where the framework allows it, and new processes where it does not."""
    arguments, defaults = [str(run_dir)], thread_defaults(job.nproc)
    spawn = Spawn(job.entry, arguments, defaults)
    if not job.fork:
        return [spawn]
    return [Warm(job.preload, job.entry, arguments, defaults, logs / "warm.log"), spawn]


if __name__ == "__main__":
    sys.exit(main())
