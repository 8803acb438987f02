"""Ranks on a list of hosts that share a folder: one agent on each, started by the system's ssh."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unitrain.agent.job import AGENT_OPTIONS, FILE, TEAM_OPTIONS, AgentJob, job_text
from unitrain.agent.local_job import STATE, job_state, job_status, start_job, wait_for
from unitrain.agent.logs import find_log, log_lines, no_log
from unitrain.agent.records import EXIT, Process, read_record, write_exit, write_record
from unitrain.errors import ExitCode, Refused, UnitrainError, UserError
from unitrain.launcher import Job, JobStatus, Launcher, Rendered
from unitrain.launchers import _ssh_team
from unitrain.launchers._hosts import (
    HOST_OPTIONS,
    Host,
    chosen_hosts,
    host_problems,
    is_word,
    odd_numbers,
    odd_variables,
    odd_words,
    unknown_options,
)
from unitrain.recipe import Recipe
from unitrain.strategy import Problem

OPTIONS = {
    **HOST_OPTIONS,
    "ssh_config": "a configuration file for ssh, instead of your own",
    "identity": "the private key to come in with",
    "python": "the Python on the hosts, which has unitrain; the one that launches unless given",
    "folder": "where the agents work on the hosts; the current folder, under the same path, unless given",
    "environment": "names of variables to pass on, such as [HF_TOKEN, NCCL_*]; the values are never written anywhere",
    "address": "name or address by which the other hosts reach the first one; its name among the hosts unless given",
    "port": "where the first host's agent listens; 20000 to 29999, by the run's id, unless given",
    "connect_seconds": "the time to reach a host; 10 unless given",
    "silence_seconds": "without a sign of life after which a connection is lost, at both ends; 30 unless given",
    "detached": "true: the agents go on when whoever launched them ends or loses the connection",
    **AGENT_OPTIONS,
    **TEAM_OPTIONS,
}
WORDS = ("ssh_config", "identity", "python", "folder", "address", "entry")
RANGES: Mapping[str, tuple[float, float]] = {
    "port": (1, 65535),
    "connect_seconds": (1.0, 3600.0),
    "silence_seconds": (3.0, 86400.0),
    "grace_seconds": (0.0, 86400.0),
    "join_seconds": (0.0, 86400.0),
    "rejoin_seconds": (0.0, 86400.0),
}
CONNECT_SECONDS, SILENCE_SECONDS = 10, 30
LOOPBACKS = ("localhost", "127.", "::1")
_POLL_SECONDS = 0.1  # for what a file or a process tells
_ASK_SECONDS = 10.0  # for what only the hosts can tell
_CONCLUDE_SECONDS = 10.0  # for the process that holds the connections to see its agents end


class SSH(Launcher):
    """One agent on each host. The job is a process of this machine that holds the connections, or none if detached."""

    name = "ssh"

    def __init__(self) -> None:
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """Hosts that are none, or not as many as nodes; options that it does not know or cannot use."""
        wanted = recipe.launcher
        options = wanted.options
        found = [
            *unknown_options(wanted, OPTIONS),
            *host_problems(wanted),
            *odd_words(options, WORDS),
            *odd_numbers(options, {**RANGES, "min_nodes": (1, wanted.nodes)}),
            *odd_variables(options),
        ]
        if type(options.get("detached", False)) is not bool:
            found.append(Problem(f"launcher.options.detached is {options['detached']!r}", "give true or false"))
        if wanted.nodes > 1 and not found and _meeting_host(options, wanted.nodes, wanted.nproc).startswith(LOOPBACKS):
            what = "the other hosts cannot reach the first one by an address of its own loopback"
            found.append(Problem(what, "give its address in the network by launcher.options.address"))
        return found

    def render(self, job: Job) -> Rendered:
        """The job for the agents, the command that reaches each host, and the command that holds them together."""
        if not is_word(str(job.run_dir)):
            raise Refused(f"the run's folder {str(job.run_dir)!r} has control characters in its name; use another")
        argv = (sys.executable, "-m", "unitrain.launchers._ssh_team", str(job.run_dir))
        return Rendered(files={FILE: job_text(job, self.name), _ssh_team.FILE: _plan_text(job)}, argv=argv)

    def submit(self, job: Job, rendered: Rendered) -> str:
        """Start the process that starts the agents; its pid is the job's id. Detached ones run when this returns."""
        for option in ("ssh_config", "identity"):
            if (path := job.options.get(option)) is not None and not Path(path).expanduser().is_file():
                raise UserError(f"launcher.options.{option} is {path}, and there is no such file here")
        process = start_job(job, rendered, self.name)
        job_id = str(process.pid)
        if not job.options.get("detached"):
            self._started[job_id] = process
            return job_id
        code, _ = wait_for(process)
        if code != ExitCode.DONE:
            said = (read_record(job.run_dir / EXIT) or {}).get("error", f"exit code {code}")
            raise (UserError if code == ExitCode.BAD_RECIPE else UnitrainError)(str(said))
        return job_id

    def wait(self, job: Job, job_id: str) -> int:
        """The run's exit code."""
        process = self._started.pop(job_id, None)
        if process is not None:
            code, _ = wait_for(process)
            return code if code >= 0 else ExitCode.FAILED  # it was killed
        if job.options.get("detached"):
            self._show_log(job)
        while (status := self.status(job.run_dir, job_id)).state in ("running", "unknown"):
            _wait_for_end(job.run_dir, _ASK_SECONDS)
        return ExitCode.FAILED if status.exit_code is None else status.exit_code

    def _show_log(self, job: Job) -> None:
        run_dir, since = job.run_dir, _attempt(job.run_dir)
        for line in log_lines(lambda: find_log(run_dir, 0, since_attempt=since), self._ended(run_dir), follow=True):
            print(line, flush=True)

    def status(self, run_dir: Path, job_id: str) -> JobStatus:
        """From the process that holds the connections; where that is gone or elsewhere, the hosts are asked."""
        status = job_status(run_dir, job_id)
        if status.state == "running" or status.exit_code is not None:
            return status
        plan = _ssh_team.Plan.read(run_dir)
        agents, failures = _ssh_team.ask_all(plan, {"do": "ask"}, "agent", seconds=0)
        alive = [f"pid {pid} on {plan.hosts[node]}" for node, pid in agents.items() if pid is not None]
        if (ended := job_status(run_dir, job_id)).exit_code is not None:
            return ended  # while we asked
        if alive:
            return JobStatus("running", detail=", ".join([*alive, *failures.values()]))
        if failures:
            return JobStatus("unknown", detail="; ".join(failures.values()))
        return JobStatus("failed", detail="none of its agents runs any more, and none has left an exit code")

    def logs(self, run_dir: Path, *, rank: int = 0, follow: bool = False) -> Iterator[str]:
        """From the run's folder, which this machine shares."""
        running = self.status(run_dir, job_state(run_dir)["job_id"]).state in ("running", "unknown")
        since = _attempt(run_dir) if running else 0
        if not running and find_log(run_dir, rank) is None:
            raise no_log(run_dir, rank)
        return log_lines(
            lambda: find_log(run_dir, rank, since_attempt=since), self._ended(run_dir), follow=follow and running
        )

    def cancel(self, run_dir: Path, job_id: str, *, grace_seconds: float = 30.0) -> None:
        """Ask the agents to stop, end what is still there after the grace, and see that nothing is left on any host."""
        if self.status(run_dir, job_id).state not in ("running", "unknown"):
            return
        state = job_state(run_dir)
        write_record(run_dir / STATE, **{**state, "cancelled": time.time()})
        deadline = time.monotonic() + grace_seconds
        holder = Process(**state["process"])
        if holder.alive:
            os.kill(holder.pid, signal.SIGTERM)  # it tells all agents at once
            while holder.alive and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        left = max(deadline - time.monotonic(), 0.0)
        plan = _ssh_team.Plan.read(run_dir)
        _, failures = _ssh_team.ask_all(plan, {"do": "stop", "seconds": left}, "stopped", seconds=left)
        while holder.alive and time.monotonic() < deadline + _CONCLUDE_SECONDS:
            time.sleep(_POLL_SECONDS)  # until it has seen them end
        if holder.alive:
            os.kill(holder.pid, signal.SIGKILL)
        if failures:
            rest = "its agent may still run; cancel again when the host is back"
            raise UnitrainError("\n".join(f"{failures[node]}; {rest}" for node in sorted(failures)))
        if read_record(run_dir / EXIT) is None:  # no agent could say so itself
            write_exit(run_dir, 128 + signal.SIGTERM)

    def _ended(self, run_dir: Path) -> Callable[[], bool]:
        """True once the run has ended. What only the hosts can tell is asked seldom."""
        asked_at = time.monotonic()

        def ended() -> bool:
            nonlocal asked_at
            if read_record(run_dir / EXIT) is not None:
                return True
            if time.monotonic() - asked_at < _ASK_SECONDS:
                return False
            asked_at = time.monotonic()
            return self.status(run_dir, job_state(run_dir)["job_id"]).state not in ("running", "unknown")

        return ended


def _plan_text(job: Job) -> str:
    """The content of ssh.json."""
    options, nodes = job.options, []
    try:
        hosts = chosen_hosts(options, job.nodes, job.nproc)
    except ValueError as error:
        raise Refused(str(error)) from error
    meet = None if job.nodes == 1 else _meeting_place(job)
    for node, host in enumerate(hosts):
        command = shlex.join([*_reach(host, options), _far_end(job, node, meet)])
        nodes.append({"node": node, "host": str(host), "command": command})
    values = {
        "nodes": nodes,
        "folder": options.get("folder", str(Path.cwd())),
        "environment": list(options.get("environment", ())),
        "detached": bool(options.get("detached")),
        "connect_seconds": options.get("connect_seconds", CONNECT_SECONDS),
        "silence_seconds": options.get("silence_seconds", SILENCE_SECONDS),
        "grace_seconds": options.get("grace_seconds", AgentJob.grace_seconds),
    }
    return json.dumps(values, indent=2) + "\n"


def _meeting_host(options: Mapping[str, Any], nodes: int, nproc: int) -> str:
    """Where the others reach the first host."""
    address: str = options.get("address", chosen_hosts(options, nodes, nproc)[0].name)
    return address


def _meeting_place(job: Job) -> str:
    address = _meeting_host(job.options, job.nodes, job.nproc)
    # Below the ports that systems give away by themselves; two runs rarely have the same.
    port = job.options.get("port", 20000 + zlib.crc32(job.run_id.encode()) % 10000)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _reach(host: Host, options: Mapping[str, Any]) -> list[str]:
    """ssh as a program uses it: no questions, no terminal, nothing forwarded, and an end when the other one is gone."""
    silence = options.get("silence_seconds", SILENCE_SECONDS)
    settings = {
        "BatchMode": "yes",
        "ConnectTimeout": math.ceil(options.get("connect_seconds", CONNECT_SECONDS)),
        "ServerAliveInterval": max(1, int(silence / 3)),
        "ServerAliveCountMax": 3,
        "ControlMaster": "no",
        "ControlPath": "none",
        "ClearAllForwardings": "yes",
    }
    words = ["ssh"]
    if (config := options.get("ssh_config")) is not None:
        words += ["-F", _absolute(config)]
    if (identity := options.get("identity")) is not None:
        words += ["-i", _absolute(identity), "-o", "IdentitiesOnly=yes"]
    words += ["-T", "-x", "-a"]
    for name, value in settings.items():
        words += ["-o", f"{name}={value}"]
    if host.port is not None:
        words += ["-p", str(host.port)]
    if host.user:
        words += ["-l", host.user]
    return [*words, "--", host.name]


def _far_end(job: Job, node: int, meet: str | None) -> str:
    """The command for the shell on the host."""
    python = job.options.get("python", sys.executable)
    words = [python, "-m", "unitrain.launchers._ssh_host", str(job.run_dir), "--node", str(node)]
    return "exec " + shlex.join([*words, *([] if meet is None else ["--meet", meet])])


def _absolute(path: str) -> str:
    """The run is asked after from other folders too."""
    return os.path.abspath(os.path.expanduser(path))


def _attempt(run_dir: Path) -> int:
    attempt: int = job_state(run_dir)["attempt"]
    return attempt


def _wait_for_end(run_dir: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while read_record(run_dir / EXIT) is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
