"""Ranks on this machine, started by our own agent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from unitrain.agent.job import AGENT_OPTIONS, FILE, job_text
from unitrain.agent.local_job import cancel_job, job_log, job_status, start_job, wait_for, wait_until_ended
from unitrain.errors import ExitCode
from unitrain.launcher import Job, JobStatus, Launcher, Rendered
from unitrain.recipe import Recipe
from unitrain.strategy import Problem

OPTIONS = {
    **AGENT_OPTIONS,
    "min_nproc": "the fewest ranks that go on when others are lost for good; launcher.nproc unless given",
    "detached": "true: the run goes on when whoever launched it is interrupted or its terminal closes",
}


class Local(Launcher):
    """One agent, as a child of the process that launches."""

    name = "local"

    def __init__(self) -> None:
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """More than one node, and options that it does not know."""
        wanted, problems = recipe.launcher, []
        if wanted.nodes != 1:
            what = f"launcher 'local' starts ranks on this machine only, and launcher.nodes is {wanted.nodes}"
            instead = "set launcher.nodes=1, or use --launcher torchrun on every node"
            problems.append(Problem(what, instead))
        for key in wanted.options:
            if key not in OPTIONS:
                problems.append(Problem(f"launcher 'local' has no option {key!r}", f"it has {', '.join(OPTIONS)}"))
        if (least := wanted.options.get("min_nproc")) is not None:
            if type(least) is not int or not 1 <= least <= wanted.nproc:
                what = f"launcher.options.min_nproc is {least!r} of launcher.nproc={wanted.nproc} ranks"
                problems.append(Problem(what, f"give a number from 1 to {wanted.nproc}"))
            elif least < wanted.nproc and recipe.checkpoint.every == 0:
                what = "another number of ranks goes on from a checkpoint, and checkpoint.every is 0"
                problems.append(Problem(what, "set checkpoint.every, or leave launcher.options.min_nproc out"))
        return problems

    def render(self, job: Job) -> Rendered:
        """The job for the agent, and the agent's command line."""
        detached = ("--detached",) if job.options.get("detached") else ()
        argv = (sys.executable, "-m", "unitrain.agent", str(job.run_dir), "--node", "0", *detached)
        return Rendered(files={FILE: job_text(job, self.name)}, argv=argv)

    def submit(self, job: Job, rendered: Rendered) -> str:
        """Start the agent; its pid is the job's id."""
        process = start_job(job, rendered, self.name, detached=bool(job.options.get("detached")))
        job_id = str(process.pid)
        self._started[job_id] = process
        return job_id

    def wait(self, job: Job, job_id: str) -> int:
        """The agent's exit code."""
        process = self._started.pop(job_id, None)
        if process is None:
            return wait_until_ended(job.run_dir, job_id)
        if job.options.get("detached"):
            for line in self.logs(job.run_dir, follow=True):
                print(line, flush=True)
            return process.wait()
        code, _ = wait_for(process)
        return code if code >= 0 else ExitCode.FAILED  # it was killed

    def status(self, run_dir: Path, job_id: str) -> JobStatus:
        """From the agent's process and what it has left."""
        return job_status(run_dir, job_id)

    def logs(self, run_dir: Path, *, rank: int = 0, follow: bool = False) -> Iterator[str]:
        """From the files that the agent has the ranks write."""
        return job_log(run_dir, rank=rank, follow=follow)

    def cancel(self, run_dir: Path, job_id: str, *, grace_seconds: float = 30.0) -> None:
        """End the agent, which ends its ranks; no rank outlives it."""
        cancel_job(run_dir, job_id, grace_seconds=grace_seconds)
