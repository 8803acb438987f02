"""Ranks under mpirun, one in each slot of the hosts: for Horovod over MPI, and for all that needs no agent of ours."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Mapping
from typing import Any

from unitrain.agent.job import FILE, job_text
from unitrain.agent.local_job import OneProcess
from unitrain.errors import Refused
from unitrain.launcher import Job, Rendered
from unitrain.launchers._hosts import (
    HOST_OPTIONS,
    chosen_hosts,
    host_problems,
    is_word,
    odd_numbers,
    odd_variables,
    odd_words,
    unknown_options,
)
from unitrain.launchers._mpi_run import find_mpirun
from unitrain.recipe import LauncherRecipe, Recipe
from unitrain.strategy import Problem
from unitrain.world import LOOPBACK

HOSTFILE = "mpi-hosts"  # in the run's folder
OPTIONS = {
    **HOST_OPTIONS,
    "mpirun": "the command; mpirun beside this Python or on PATH unless given",
    "python": "the Python on the hosts, which has unitrain; the one that launches unless given",
    "ssh_config": "a configuration file for ssh, by which mpirun reaches other hosts; users and ports stand there",
    "identity": "the private key to come in with",
    "environment": "names of variables to pass on to other hosts, such as [HF_TOKEN, PYTHONPATH]",
    "address": "name or address by which the other hosts reach the first one; its name among the hosts unless given",
    "port": "where rank 0 listens for what does not go by MPI; 20000 to 29999, by the run's id, unless given",
    "mca": "settings for mpirun's --mca, as {name: value}, such as {btl_tcp_if_include: eth0}",
    "allow_run_as_root": "true: mpirun runs as root, which it refuses otherwise",
    "grace_seconds": "from the signal to stop until the ranks are ended, for them to save; 30 unless given",
    "detached": "true: the run goes on when whoever launched it is interrupted or its terminal closes",
}
AGENTS_ONLY = {"min_nodes", "min_nproc", "join_seconds", "rejoin_seconds", "entry"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # which start_job sets here, and every host must have
ROOT = {f"{project}_ALLOW_RUN_AS_ROOT{confirm}": "1" for project in ("OMPI", "PRTE") for confirm in ("", "_CONFIRM")}
# mpirun splits it at spaces; one name of the variable for Open MPI 4, the other from 5 on
REMOTE_SHELL = ("OMPI_MCA_plm_rsh_agent", "PRTE_MCA_plm_ssh_agent")
_SETTING = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class MPI(OneProcess):
    """One mpirun, held by a process of this machine, which is the job."""

    name = "mpi"

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """Hosts that mpirun cannot be told, and options that it does not know or cannot use."""
        wanted = recipe.launcher
        options = wanted.options
        found = [
            *_unknown(wanted),
            *_host_problems(wanted),
            *odd_words(options, ("mpirun", "python", "ssh_config", "identity", "address")),
            *odd_numbers(options, {"port": (1, 65535), "grace_seconds": (0.0, 86400.0)}),
            *odd_variables(options),
        ]
        found += [
            Problem(f"launcher.options.{name} is {value!r}", "mpirun takes no path with spaces here; use another")
            for name in ("ssh_config", "identity")
            if is_word(value := options.get(name)) and " " in str(value)
        ]
        for name in ("allow_run_as_root", "detached"):
            if type(options.get(name, False)) is not bool:
                found.append(Problem(f"launcher.options.{name} is {options[name]!r}", "give true or false"))
        if any(isinstance(name, str) and name.endswith("*") for name in options.get("environment") or ()):
            found.append(Problem("launcher.options.environment has a pattern", "name each variable for mpirun"))
        settings = options.get("mca", {})
        if not isinstance(settings, Mapping) or not all(
            isinstance(name, str) and _SETTING.fullmatch(name) and is_word(str(value))
            for name, value in settings.items()
        ):
            what = f"launcher.options.mca is {settings!r}"
            found.append(Problem(what, "give settings as {name: value}, such as {btl_tcp_if_include: eth0}"))
        return found

    def render(self, job: Job) -> Rendered:
        """The hosts for mpirun, and its command line."""
        if not is_word(str(job.run_dir)):
            raise Refused(f"the run's folder {str(job.run_dir)!r} has control characters in its name; use another")
        options = job.options
        environ = {
            "MASTER_ADDR": LOOPBACK if job.nodes == 1 else options.get("address", _hosts(job)[0]),
            # Below the ports that systems give away by themselves; two runs rarely have the same.
            "MASTER_PORT": str(options.get("port", 20000 + zlib.crc32(job.run_id.encode()) % 10000)),
            **(dict.fromkeys(REMOTE_SHELL, _remote_shell(options)) if job.nodes > 1 else {}),
            **(ROOT if options.get("allow_run_as_root") else {}),
        }
        command = [options.get("mpirun", "mpirun"), "--hostfile", str(job.run_dir / HOSTFILE)]
        command += ["-np", str(job.nodes * job.nproc), "--map-by", "slot", "--bind-to", "none"]
        for name in ("MASTER_ADDR", "MASTER_PORT", *THREADS, *options.get("environment", ())):
            command += ["-x", name]
        for name, value in options.get("mca", {}).items():
            command += ["--mca", name, str(value)]
        command += [options.get("python", sys.executable), "-m", "unitrain.worker", str(job.run_dir), "--keep-logs"]
        holder = [sys.executable, "-m", "unitrain.launchers._mpi_run", str(job.run_dir)]
        holder += ["--detached"] if options.get("detached") else []
        hosts = "".join(f"{host} slots={job.nproc}\n" for host in _hosts(job))
        return Rendered(
            files={FILE: job_text(job, self.name), HOSTFILE: hosts},
            argv=(*holder, "--", *command),
            environ=environ,
        )

    def submit(self, job: Job, rendered: Rendered) -> str:
        """Start what holds mpirun. Raises UserError where there is no mpirun."""
        find_mpirun(job.options.get("mpirun", "mpirun"))
        return super().submit(job, rendered)


def _unknown(wanted: LauncherRecipe) -> list[Problem]:
    taken = [key for key in wanted.options if key in AGENTS_ONLY]
    rest = LauncherRecipe(
        name=wanted.name, options={key: value for key, value in wanted.options.items() if key not in taken}
    )
    instead = "use --launcher ssh: mpirun neither restarts ranks nor goes on with fewer"
    refused = [Problem(f"launcher 'mpi' has no option {key!r}, which is of our agents", instead) for key in taken]
    return [*refused, *unknown_options(rest, OPTIONS)]


def _host_problems(wanted: LauncherRecipe) -> list[Problem]:
    options = wanted.options
    if wanted.nodes == 1 and options.get("hosts") is None and options.get("hostfile") is None:
        return []  # this machine
    if found := host_problems(wanted):
        return found
    hosts = chosen_hosts(options, wanted.nodes, wanted.nproc)
    return [
        Problem(
            f"{host}{f':{host.port}' if host.port else ''} names a user or a port, which mpirun passes to nobody",
            "write both for that host into a configuration of ssh, and give launcher.options.ssh_config",
        )
        for host in hosts
        if host.user or host.port is not None
    ]


def _hosts(job: Job) -> list[str]:
    options = job.options
    if job.nodes == 1 and options.get("hosts") is None and options.get("hostfile") is None:
        return ["localhost"]
    try:
        return [host.name for host in chosen_hosts(options, job.nodes, job.nproc)]
    except ValueError as error:
        raise Refused(str(error)) from error


def _remote_shell(options: Mapping[str, Any]) -> str:
    words = ["ssh"]
    if options.get("ssh_config") is not None:
        words += ["-F", options["ssh_config"]]
    if options.get("identity") is not None:
        words += ["-i", options["identity"], "-o", "IdentitiesOnly=yes"]
    return " ".join([*words, "-x", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"])
