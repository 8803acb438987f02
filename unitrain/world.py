"""Who am I among the ranks: the only reader of the process environment.

Our agent sets the variables that torchrun sets, so that a plain torch script runs under either. A worker
started by srun, mpirun or horovodrun alone finds its place from theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UserError
from .heartbeat import Heartbeat, Phase

LOOPBACK = "127.0.0.1"

# variable names of each starter, in the order in which they are tried
STARTERS: dict[str, dict[str, str]] = {
    "torchrun": {
        "rank": "RANK",
        "size": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_size": "LOCAL_WORLD_SIZE",
        "node": "GROUP_RANK",
        "nodes": "GROUP_WORLD_SIZE",
        "generation": "TORCHELASTIC_RESTART_COUNT",
    },
    "horovodrun": {
        "rank": "HOROVOD_RANK",
        "size": "HOROVOD_SIZE",
        "local_rank": "HOROVOD_LOCAL_RANK",
        "local_size": "HOROVOD_LOCAL_SIZE",
        "node": "HOROVOD_CROSS_RANK",
        "nodes": "HOROVOD_CROSS_SIZE",
    },
    "mpirun": {
        "rank": "OMPI_COMM_WORLD_RANK",
        "size": "OMPI_COMM_WORLD_SIZE",
        "local_rank": "OMPI_COMM_WORLD_LOCAL_RANK",
        "local_size": "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    "srun": {
        "rank": "SLURM_PROCID",
        "size": "SLURM_NTASKS",
        "local_rank": "SLURM_LOCALID",
        "node": "SLURM_NODEID",
        "nodes": "SLURM_NNODES",
        "generation": "SLURM_RESTART_COUNT",
    },
}


@dataclass(frozen=True, kw_only=True)
class World:
    """One rank's place in the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    nodes: int = 1
    coordinator: str = ""  # host:port on which rank 0 listens; empty when alone
    generation: int = 0  # +1 on every restart of the group
    starter: str = "alone"  # what started this rank: agent, torchrun, horovodrun, mpirun, srun, alone
    threads: int | None = None  # intra-op CPU threads; None leaves the framework's default
    agent_fd: int | None = None  # our agent listens here, one JSON object a line
    heartbeat: Heartbeat | None = None  # our agent sees here that this rank gets on
    group: str = ""  # name of the processes on several machines that are one job, where the starter has one
    memory_fd: int | None = None  # our agent's memory for snapshots, which outlives this rank
    snapshot: str = ""  # on several nodes, the one that the memory of every node has
    stacks: str | None = None  # file into which this rank writes its stacks when our agent asks

    @property
    def first(self) -> bool:
        """True on the rank that speaks for the run."""
        return self.rank == 0

    @property
    def coordinator_address(self) -> tuple[str, int]:
        """Host and port on which rank 0 listens."""
        host, _, port = self.coordinator.rpartition(":")
        return host, int(port)

    def tell_agent(self, **message: Any) -> None:
        """Send one message to the agent, if one listens. A vanished agent is not an error of the rank."""
        if self.agent_fd is None:
            return
        line = json.dumps(message) + "\n"
        try:
            os.write(self.agent_fd, line.encode())
        except BrokenPipeError:
            pass  # the agent is gone: the run itself may still finish

    def beat(self, phase: Phase, step: int) -> None:
        """Tell the agent, if one watches, that this rank gets on."""
        if self.heartbeat is not None:
            self.heartbeat.beat(phase, step)

    @property
    def supervisor(self) -> int:
        """The process that lives as long as the job does: what starts its attempts, or this rank itself."""
        return os.getppid() if self.starter in ("agent", "torchrun") else os.getpid()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> World:
        """The place that the starter of this process gave it; alone when there is none.

        Raises UserError when the variables contradict each other.
        """
        environ = os.environ if environ is None else environ
        starter = _starter(environ)
        threads = _integer(environ, "OMP_NUM_THREADS") if "OMP_NUM_THREADS" in environ else None
        if starter is None:
            return cls(threads=threads)
        names = STARTERS[starter]
        found = {field: _integer(environ, name) for field, name in names.items() if name in environ}
        rank, size = found["rank"], found["size"]
        if not 0 <= rank < size:
            raise UserError(f"{names['rank']}={rank} does not fit {names['size']}={size}: ranks count from 0")
        found.setdefault("local_size", size // max(found.get("nodes", 1), 1))
        found.setdefault("local_rank", rank % max(found["local_size"], 1))
        found.setdefault("nodes", max(size // max(found["local_size"], 1), 1))
        found.setdefault("node", rank // max(found["local_size"], 1))
        agent_fd = _integer(environ, "UNITRAIN_AGENT_FD") if "UNITRAIN_AGENT_FD" in environ else None
        return cls(
            **found,
            coordinator=_coordinator(environ, starter, found["nodes"]) if size > 1 else "",
            starter="agent" if agent_fd is not None else starter,
            threads=threads,
            group=_group(environ) if agent_fd is None and starter == "torchrun" else "",
            agent_fd=agent_fd,
            heartbeat=Heartbeat.of(environ["UNITRAIN_HEARTBEAT"]) if "UNITRAIN_HEARTBEAT" in environ else None,
            memory_fd=_integer(environ, "UNITRAIN_MEMORY") if "UNITRAIN_MEMORY" in environ else None,
            snapshot=environ.get("UNITRAIN_SNAPSHOT", ""),
            stacks=environ.get("UNITRAIN_STACKS"),
        )


def environment() -> dict[str, str]:
    """All variables of this process, secrets among them: for `redaction`, which decides what may be kept."""
    return dict(os.environ)


def forget_variables(*prefixes: str) -> list[str]:
    """Remove the variables of these prefixes from this process, so that no library obeys them; their names."""
    found = sorted(name for name in os.environ if name.startswith(prefixes))
    for name in found:
        del os.environ[name]
    return found


def _group(environ: Mapping[str, str]) -> str:
    """torchrun's `--rdzv-id`; `none` is what everybody has who gave none."""
    name = environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name[:200]


def _starter(environ: Mapping[str, str]) -> str | None:
    """The first starter whose rank and size are both set; srun also needs a step (an sbatch script is no rank)."""
    for starter, names in STARTERS.items():
        rank, size = names["rank"] in environ, names["size"] in environ
        if starter == "srun" and environ.get("SLURM_STEP_ID") in (None, "", "4294967291"):
            continue  # salloc and batch shells carry SLURM_PROCID too
        if rank and size:
            return starter
        if starter == "torchrun" and rank != size:
            there, absent = (names["rank"], names["size"]) if rank else (names["size"], names["rank"])
            raise UserError(f"{there} is set but {absent} is not: set both, or neither to run alone")
    return None


def _coordinator(environ: Mapping[str, str], starter: str, nodes: int) -> str:
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if host and port:
        return f"{host}:{port}"
    if starter == "horovodrun" and environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT"):
        # horovodrun starts each rank from a process of its own; what they share is its store, whose port is taken.
        host = environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"] if nodes > 1 else LOOPBACK
        return f"{host}:{20000 + (_integer(environ, 'HOROVOD_GLOO_RENDEZVOUS_PORT') + 5000) % 10000}"
    if nodes > 1:
        raise UserError(f"{nodes} nodes were started by {starter}, but MASTER_ADDR and MASTER_PORT are not both set")
    # One node: any port that all its ranks derive alike and two jobs rarely share.
    job = environ.get("SLURM_JOB_ID") or str(os.getppid())
    return f"{LOOPBACK}:{20000 + int(job) % 10000}"


def _integer(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    try:
        return int(text.split(",")[0])  # OMP_NUM_THREADS may list a number per nesting level
    except ValueError:
        raise UserError(f"the environment has {name}={text!r}, which is not a whole number") from None
