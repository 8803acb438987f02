"""Ranks on this machine, started by our own agent."""

from __future__ import annotations

import sys

from unitrain.agent.job import AGENT_OPTIONS, FILE, job_text
from unitrain.agent.local_job import OneProcess
from unitrain.launcher import Job, Rendered
from unitrain.recipe import Recipe
from unitrain.strategy import Problem

OPTIONS = {
    **AGENT_OPTIONS,
    "min_nproc": "the fewest ranks that go on when others are lost for good; launcher.nproc unless given",
    "detached": "true: the run goes on when whoever launched it is interrupted or its terminal closes",
}


class Local(OneProcess):
    """One agent, as a child of the process that launches."""

    name = "local"

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """More than one node, and options that it does not know."""
        wanted, problems = recipe.launcher, []
        if wanted.nodes != 1:
            what = f"launcher 'local' starts ranks on this machine only, and launcher.nodes is {wanted.nodes}"
            instead = "set launcher.nodes=1, or use --launcher ssh, slurm, kubernetes or torchrun"
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
