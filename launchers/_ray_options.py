"""What a recipe may ask of the launcher `ray`, and what follows from it: bundles, agents, an entrypoint."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unitrain.agent.job import AGENT_OPTIONS, TEAM_OPTIONS, AgentJob
from unitrain.agent.records import read_record
from unitrain.errors import Refused, UserError
from unitrain.launcher import Job
from unitrain.launchers._hosts import is_word, odd_numbers, odd_variables, odd_words, unknown_options
from unitrain.recipe import Recipe
from unitrain.redaction import speaks_of_secrets
from unitrain.strategy import Problem

FILE = "ray.json"  # in the run's folder: what the driver does
FOLDER = "ray"  # there too: what whoever asks and the driver tell each other
STOP, WAITING = "stop", "waiting"  # in it: the number of a signal; for what the driver waits
PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
WAIT_SECONDS = 300.0
DRIVER = "unitrain.launchers._ray_driver"

OPTIONS = {
    "address": "of a running cluster's Jobs API, http(s)://HOST:PORT; unless given, a private Ray on this machine",
    "ca_file": "certificates to trust at an https address, instead of the system's",
    "placement": f"of the nodes' bundles: {', '.join(PLACEMENTS)}; PACK unless given",
    "cpus_per_rank": "Ray's CPUs for each rank, and its threads where it is given; 1 unless given",
    "gpus_per_rank": "Ray's GPUs for each rank; none unless given, and on a private Ray all that this machine has",
    "resources": "custom resources of each node, such as {rack-a: 0.01}",
    "wait_seconds": f"how long to wait for room in the cluster; {WAIT_SECONDS:g} unless given",
    "python": "the Python in the cluster, which has unitrain; the one that launches unless given",
    "folder": "where the agents work; the current folder, under the same path, unless given",
    "environment": "names of variables to pass on, such as [HF_HOME, NCCL_*]; Ray shows their values to its users",
    "detached": "true: a private Ray's job goes on when whoever launched it ends; one in a cluster always does",
    **AGENT_OPTIONS,
    **TEAM_OPTIONS,
}
WORDS = ("ca_file", "python", "folder", "entry")
RANGES: Mapping[str, tuple[float, float]] = {
    "cpus_per_rank": (0.01, 4096.0),
    "gpus_per_rank": (0.0, 64.0),
    "wait_seconds": (0.0, 604800.0),
    "grace_seconds": (0.0, 86400.0),
    "join_seconds": (0.0, 86400.0),
    "rejoin_seconds": (0.0, 86400.0),
}
_ADDRESS = re.compile(r"https?://(?:[A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?/?")
_RESOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,62}")
_OF_RAY = {"CPU": "cpus_per_rank", "GPU": "gpus_per_rank", "memory": "", "object_store_memory": ""}


def problems(recipe: Recipe) -> list[Problem]:
    """What is wrong with the options of a recipe."""
    wanted = recipe.launcher
    options = wanted.options
    found = [
        *unknown_options(wanted, OPTIONS),
        *odd_words(options, WORDS),
        *odd_numbers(options, {**RANGES, "min_nodes": (1, wanted.nodes)}),
        *odd_variables(options),
        *_odd_address(options),
        *_odd_resources(options),
    ]
    if (placement := options.get("placement")) is not None and placement not in PLACEMENTS:
        what = f"launcher.options.placement is {str(placement)[:60]!r}"
        found.append(Problem(what, f"give one of {', '.join(PLACEMENTS)}"))
    if type(options.get("detached", False)) is not bool:
        found.append(Problem(f"launcher.options.detached is {options['detached']!r}", "give true or false"))
    if not found:
        found += [*_secrets(options), *_uneven_gpus(options, wanted.nproc), *_misplaced(options, wanted.nodes)]
    return found


def _odd_address(options: Mapping[str, Any]) -> list[Problem]:
    address = options.get("address")
    form = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if address is None or (form is not None and 0 < int(form[1] or 1) < 65536):
        return []
    instead = "give that of the Jobs API, such as http://head-node:8265; the token comes from RAY_AUTH_TOKEN"
    return [Problem(f"launcher.options.address is {str(address)[:80]!r}", instead)]


def _odd_resources(options: Mapping[str, Any]) -> list[Problem]:
    given = options.get("resources")
    if given is None:
        return []
    if isinstance(given, Mapping):
        if ours := [name for name in given if name in _OF_RAY]:
            instead = f"set launcher.options.{_OF_RAY[ours[0]]}" if _OF_RAY[ours[0]] else "name custom ones only"
            return [Problem(f"launcher.options.resources has {ours[0]}, which is no custom resource", instead)]
        if all(isinstance(name, str) and _RESOURCE.fullmatch(name) and _amount(n) for name, n in given.items()):
            return []
    what = f"launcher.options.resources is {str(given)[:80]!r}"
    return [Problem(what, "give a table of names and amounts above 0, such as {rack-a: 0.01}")]


def _amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e9


def _secrets(options: Mapping[str, Any]) -> list[Problem]:
    """Ray shows a job's environment to all who reach its dashboard."""
    names = [name for name in options.get("environment", ()) if speaks_of_secrets(name)]
    if not names or options.get("address") is None:
        return []
    what = f"launcher.options.environment names {', '.join(names)}, and Ray shows a job's variables to all its users"
    return [Problem(what, "set it on the cluster's nodes, or keep it in a file that only you can read")]


def _uneven_gpus(options: Mapping[str, Any], nproc: int) -> list[Problem]:
    gpus = options.get("gpus_per_rank", 0) * nproc
    if gpus <= 1 or float(gpus).is_integer():
        return []
    what = f"launcher.options.gpus_per_rank is {options['gpus_per_rank']}, which makes {gpus:g} GPUs for {nproc} ranks"
    return [Problem(what, "Ray gives a node's agent whole GPUs beyond one; choose a whole number of them")]


def _misplaced(options: Mapping[str, Any], nodes: int) -> list[Problem]:
    if options.get("address") is None and options.get("placement") == "STRICT_SPREAD" and nodes > 1:
        what = "a private Ray has one machine, and launcher.options.placement is STRICT_SPREAD"
        return [Problem(what, "give launcher.options.address of a cluster, or leave the placement out")]
    return []


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ray.json holds."""

    address: str | None  # of the Jobs API; None: the driver has no need of it
    private: bool  # the driver makes a Ray of its own
    submission_id: str  # of Ray's job; with a number behind it where the cluster has had it before
    entrypoint: str  # what a shell in the cluster runs; empty on a private Ray
    bundle: Mapping[str, float]  # of each node
    placement: str
    python: str
    folder: str
    environment: tuple[str, ...]
    threads: int | None  # of each rank; None: as everywhere
    wait_seconds: float
    rejoin_seconds: float
    ca_file: str | None

    @classmethod
    def of(cls, job: Job) -> Plan:
        """Raises Refused where the run's folder cannot stand in a command."""
        if not is_word(str(job.run_dir)):
            raise Refused(f"the run's folder {str(job.run_dir)!r} has control characters in its name; use another")
        options = job.options
        address, python = options.get("address"), options.get("python", sys.executable)
        folder, cpus = options.get("folder", str(Path.cwd())), options.get("cpus_per_rank")
        command = shlex.join([python, "-m", DRIVER, str(job.run_dir)])
        return cls(
            address=None if address is None else address.rstrip("/"),
            private=address is None,
            submission_id="" if address is None else submission_id(job.run_dir, job.run_id),
            entrypoint="" if address is None else f"cd {shlex.quote(folder)} && exec {command}",
            bundle=bundle(options, job.nproc),
            placement=options.get("placement", "PACK"),
            python=python,
            folder=folder,
            environment=tuple(options.get("environment", ())),
            threads=None if cpus is None else max(1, int(cpus)),
            wait_seconds=float(options.get("wait_seconds", WAIT_SECONDS)),
            rejoin_seconds=float(options.get("rejoin_seconds", AgentJob.rejoin_seconds)),
            ca_file=None if options.get("ca_file") is None else os.path.abspath(os.path.expanduser(options["ca_file"])),
        )

    @classmethod
    def read(cls, run_dir: Path) -> Plan:
        """Raises UserError where a run's folder has none that can be used."""
        path = run_dir / FILE
        values = read_record(path)
        if values is None:
            raise UserError(
                f"there is no {path} on {os.uname().nodename}: the run's folder must be on a file system that all "
                "nodes of the cluster share with whoever launches, under the same path"
            )
        try:
            return cls(
                address=None if values["address"] is None else str(values["address"]),
                private=bool(values["private"]),
                submission_id=str(values["submission_id"]),
                entrypoint=str(values["entrypoint"]),
                bundle={str(name): float(amount) for name, amount in values["bundle"].items()},
                placement=str(values["placement"]),
                python=str(values["python"]),
                folder=str(values["folder"]),
                environment=tuple(map(str, values["environment"])),
                threads=None if values["threads"] is None else int(values["threads"]),
                wait_seconds=float(values["wait_seconds"]),
                rejoin_seconds=float(values["rejoin_seconds"]),
                ca_file=None if values["ca_file"] is None else str(values["ca_file"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); launch the run anew") from error

    @property
    def text(self) -> str:
        """The content of ray.json."""
        values = {**vars(self), "bundle": dict(self.bundle), "environment": list(self.environment)}
        return json.dumps(values, indent=2) + "\n"


def bundle(options: Mapping[str, Any], nproc: int) -> dict[str, float]:
    """What each node takes of the cluster."""
    found = {"CPU": float(options.get("cpus_per_rank", 1)) * nproc}
    if gpus := options.get("gpus_per_rank", 0) * nproc:
        found["GPU"] = float(gpus)
    return found | {name: float(amount) for name, amount in options.get("resources", {}).items()}


def submission_id(run_dir: Path, run_id: str) -> str:
    """Of Ray's job: the run's id as far as it can be one, and a mark of its folder."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_id).strip("-.")[:60] or "run"
    return f"{plain}-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:6]}"
