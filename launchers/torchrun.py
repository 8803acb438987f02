"""Ranks under torchrun, torch's elastic agent: one on this node, and yours to start on every other."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unitrain.agent.failures import conclude
from unitrain.agent.job import FILE, job_text
from unitrain.agent.local_job import OneProcess, wait_for, wait_until_ended
from unitrain.agent.screen import say
from unitrain.launcher import Job, Rendered
from unitrain.recipe import LauncherRecipe, Recipe
from unitrain.strategy import Problem

RENDEZVOUS = ("rdzv_endpoint", "master_addr")  # one of these says where several nodes meet
FLAGS = (
    *("rdzv_endpoint", "rdzv_backend", "rdzv_id", "rdzv_conf", "local_addr"),
    *("master_addr", "master_port", "node_rank"),
    *("max_restarts", "monitor_interval", "shutdown_timeout", "signals_to_handle", "start_method", "numa_binding"),
    *("role", "virtual_local_rank", "event_log_handler", "log_dir", "logs_specs", "redirects", "tee"),
    *("local_ranks_filter", "duplicate_stdout_filters", "duplicate_stderr_filters"),
)
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


class Torchrun(OneProcess):
    """One torchrun, as a child of the process that launches; its options are torchrun's flags."""

    name = "torchrun"

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """Several nodes without a place to meet, and flags that are not the user's."""
        wanted, problems = recipe.launcher, []
        if wanted.nodes > 1 and not any(key in wanted.options for key in RENDEZVOUS):
            what = f"launcher 'torchrun' does not know where {wanted.nodes} nodes meet"
            instead = (
                "set launcher.options.rdzv_endpoint=HOST:PORT of one of them, launch there, and run what the launch "
                "says on the others; or use --launcher ssh, which starts all of them"
            )
            problems.append(Problem(what, instead))
        problems += _rendezvous_problems(wanted)
        for key, ours in TAKEN.items():
            if key in wanted.options:
                problems.append(Problem(f"launcher 'torchrun' has {key} from {ours}", f"set {ours}"))
        if (least := wanted.options.get("min_nodes")) is not None and (
            type(least) is not int or not 1 <= least <= wanted.nodes
        ):
            what = f"launcher.options.min_nodes is {least!r} of launcher.nodes={wanted.nodes}"
            problems.append(Problem(what, f"give a number from 1 to {wanted.nodes}"))
        for key, value in wanted.options.items():
            if key in REFUSED or key not in (*FLAGS, *TAKEN, "min_nodes"):
                instead = REFUSED.get(key, f"it has min_nodes and torchrun's flags {', '.join(FLAGS)}")
                problems.append(Problem(f"launcher 'torchrun' has no option {str(key)[:60]!r}", instead))
            elif not _is_word(value):
                what = f"launcher.options.{key} is {value!r}"
                problems.append(Problem(what, "give a text without control characters or dash before, or a number"))
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
        """Start torchrun, and say what is to be run on the other hosts."""
        job_id = super().submit(job, rendered)
        if job.nodes > 1 and not job.options.get("node_rank"):
            say(_for_others(job, rendered))
        return job_id

    def wait(self, job: Job, job_id: str) -> int:
        """Show rank 0's log until torchrun ends, then the first failure; torchrun's own code would be 1 for any."""
        process = self._started.pop(job_id, None)
        if process is None:
            return wait_until_ended(job.run_dir, job_id)
        log = threading.Thread(target=self.show_log, args=(job,))
        log.start()
        code, caught = wait_for(process, understands=SIGNALS)
        log.join()
        return conclude(job.run_dir, code, caught)


def _rendezvous_problems(wanted: LauncherRecipe) -> list[Problem]:
    options, found = wanted.options, []
    static = "master_addr" in options
    if static and "rdzv_endpoint" in options:
        what = "launcher.options has master_addr and rdzv_endpoint"
        found.append(
            Problem(what, "give master_addr for nodes that are fixed, or rdzv_endpoint for those that may change")
        )
    if static and "min_nodes" in options:
        what = "nodes that meet at master_addr are fixed, and launcher.options has min_nodes"
        found.append(Problem(what, "give rdzv_endpoint instead of master_addr"))
    if (number := options.get("node_rank")) is not None and (
        type(number) is not int or not 0 <= number < wanted.nodes or not static
    ):
        what = f"launcher.options.node_rank is {number!r} of launcher.nodes={wanted.nodes}"
        found.append(Problem(what, f"give a number from 0 to {wanted.nodes - 1}, and master_addr"))
    return found


def _is_word(value: Any) -> bool:
    """True for what torchrun cannot take for anything but the value of its flag."""
    if isinstance(value, str):
        return value != "" and value.isprintable() and not value.startswith("-")
    return value is None or type(value) in (int, float, bool)


def _for_others(job: Job, rendered: Rendered) -> str:
    """What whoever launches has to do on the other hosts."""
    setting = [f"{name}={shlex.quote(value)}" for name, value in rendered.environ.items()]
    command = " ".join([f"cd {shlex.quote(str(Path.cwd()))} &&", *setting, shlex.join(rendered.argv)])
    if "master_addr" not in job.options:
        return f"now run on {_counted(job.nodes - 1)}, in any order:\n  {command}"
    start, flag, rest = command.partition(" -m unitrain.worker ")
    numbers = "1" if job.nodes == 2 else f"1, ... {job.nodes - 1} (one for each)"
    start = start.replace(" --node-rank 0", "")
    return f"now run on {_counted(job.nodes - 1)}, with N = {numbers}:\n  {start} --node-rank N{flag}{rest}"


def _counted(others: int) -> str:
    return "the other host" if others == 1 else f"each of the other {others} hosts"


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
