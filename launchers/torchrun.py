"""Ranks under torchrun, torch's elastic agent: one on this node, and yours to start on every other."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unitrain.agent.failures import conclude
from unitrain.agent.job import FILE, job_text
from unitrain.agent.local_job import cancel_job, job_log, job_status, start_job, wait_for, wait_until_ended
from unitrain.errors import UserError
from unitrain.launcher import Job, JobStatus, Launcher, Rendered
from unitrain.recipe import Recipe
from unitrain.strategy import Problem

RENDEZVOUS = ("rdzv_endpoint", "master_addr")  # one of these says where several nodes meet
TAKEN = {"nnodes": "launcher.nodes", "nproc_per_node": "launcher.nproc"}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # torchrun passes these on; others would end it at once
REFUSED = {
    "standalone": "leave it out: one node stands alone unless an option says where nodes meet",
    "module": "leave it out: torchrun runs unitrain.worker",
    "min_nproc": "use --launcher local, or min_nodes: torchrun goes on with fewer nodes, not with fewer ranks of one",
    "detached": "use --launcher local",
}
# Rank 0 then listens at MASTER_PORT, as other starters have it; else torchrun itself does, and only torch can use that.
ENVIRON = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Torchrun(Launcher):
    """One torchrun, as a child of the process that launches; its options are torchrun's flags."""

    name = "torchrun"

    def __init__(self) -> None:
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """Several nodes without a place to meet, and flags that are not the user's."""
        wanted, problems = recipe.launcher, []
        if wanted.nodes > 1 and not any(key in wanted.options for key in RENDEZVOUS):
            what = f"launcher 'torchrun' does not know where {wanted.nodes} nodes meet"
            instead = (
                "set launcher.options.rdzv_endpoint=HOST:PORT of one of them, and launch on every node, "
                "in a --run-dir of the same name"
            )
            problems.append(Problem(what, instead))
        for key, ours in TAKEN.items():
            if key in wanted.options:
                problems.append(Problem(f"launcher 'torchrun' has {key} from {ours}", f"set {ours}"))
        if (least := wanted.options.get("min_nodes")) is not None and (
            type(least) is not int or not 1 <= least <= wanted.nodes
        ):
            what = f"launcher.options.min_nodes is {least!r} of launcher.nodes={wanted.nodes}"
            problems.append(Problem(what, f"give a number from 1 to {wanted.nodes}"))
        for key, instead in REFUSED.items():
            if key in wanted.options:
                problems.append(Problem(f"launcher 'torchrun' has no option {key!r}", instead))
        return problems

    def render(self, job: Job) -> Rendered:
        """torchrun's command line for this node."""
        options: dict[str, Any] = dict(job.options)
        least = options.pop("min_nodes", None)
        if not any(key in options for key in RENDEZVOUS):
            options["standalone"] = True
        elif "rdzv_endpoint" in options:
            options = {"rdzv_backend": "c10d", "rdzv_id": job.run_id, **options}
        options = {
            "nnodes": job.nodes if least is None else f"{least}:{job.nodes}",
            "nproc_per_node": job.nproc,
            **options,
        }
        argv = (
            *(sys.executable, "-m", "torch.distributed.run", *_flags(options)),
            *("-m", "unitrain.worker", str(job.run_dir), "--keep-logs"),
        )
        return Rendered(files={FILE: job_text(job, self.name)}, argv=argv, environ=ENVIRON)

    def submit(self, job: Job, rendered: Rendered) -> str:
        """Start torchrun; its pid is the job's id."""
        process = start_job(job, rendered, self.name)
        job_id = str(process.pid)
        self._started[job_id] = process
        return job_id

    def wait(self, job: Job, job_id: str) -> int:
        """Show rank 0's log until torchrun ends, then the first failure; torchrun's own code would be 1 for any."""
        process = self._started.pop(job_id, None)
        if process is None:
            return wait_until_ended(job.run_dir, job_id)
        log = threading.Thread(target=self._show_log, args=(job,))
        log.start()
        code, caught = wait_for(process, understands=SIGNALS)
        log.join()
        return conclude(job.run_dir, code, caught)

    def _show_log(self, job: Job) -> None:
        try:
            for line in self.logs(job.run_dir, follow=True):
                print(line, flush=True)
        except UserError:
            return  # it ended before any rank had a log; `wait` says how

    def status(self, run_dir: Path, job_id: str) -> JobStatus:
        """From torchrun's process, and what the one that waited for it has left."""
        return job_status(run_dir, job_id)

    def logs(self, run_dir: Path, *, rank: int = 0, follow: bool = False) -> Iterator[str]:
        """From the files that the ranks write."""
        return job_log(run_dir, rank=rank, follow=follow)

    def cancel(self, run_dir: Path, job_id: str, *, grace_seconds: float = 30.0) -> None:
        """End torchrun, which ends its ranks; no rank outlives it."""
        cancel_job(run_dir, job_id, grace_seconds=grace_seconds)


def _flags(options: Mapping[str, Any]) -> list[str]:
    """`{"max_restarts": 2}` as `--max-restarts 2`; true is a bare flag, false and null are none."""
    flags: list[str] = []
    for key, value in options.items():
        if value is None or value is False:
            continue
        flags.append(f"--{key.replace('_', '-')}")
        if value is not True:
            flags.append(str(value))
    return flags
