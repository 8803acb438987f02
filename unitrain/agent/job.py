"""What `job.json` tells an agent: the shape of the run and how a rank begins."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .records import read_record

if TYPE_CHECKING:
    from ..launcher import Job  # not at run time: it imports numpy, and an agent must start in milliseconds

FILE = "job.json"
_MOST_RANKS = 1 << 20
_MOST_SECONDS = 1e9
WORKER = "unitrain.worker:main"

# What every launcher that starts our agents hands on to them from `launcher.options`.
AGENT_OPTIONS = {
    "grace_seconds": "from SIGTERM to SIGKILL when ranks are stopped, for them to save; 30 unless given",
    "entry": "module:function that a rank runs; unitrain.worker:main unless given",
}
# What those that start agents on several nodes hand on beside.
TEAM_OPTIONS = {
    "min_nodes": "the fewest nodes that go on when others are lost for good; launcher.nodes unless given",
    "join_seconds": "how long the first node waits for the others at the start; 600 unless given",
    "rejoin_seconds": "how long it waits for a lost one to come back; 60 unless given",
}


@dataclass(frozen=True, kw_only=True)
class AgentJob:
    """The shape of a run and how its ranks begin."""

    run_id: str
    nodes: int
    nproc: int
    preload: tuple[str, ...] = ()  # modules that the warm process imports before it forks ranks
    fork: bool = True
    entry: str = WORKER  # what a rank runs, as module:function; it takes the arguments and returns an exit code
    grace_seconds: float = 30.0  # between SIGTERM and SIGKILL when the ranks are stopped; they save meanwhile
    min_nproc: int | None = None  # ranks with which the run still goes on where slots are lost; None: all
    restarts: int = 0  # failed attempts in a row without a newer checkpoint that end the run; 0: the first one does
    min_nodes: int | None = None  # nodes with which the run still goes on where others are lost; None: all
    join_seconds: float = 600.0  # for which the first node waits for the others at the start
    rejoin_seconds: float = 60.0  # for which it waits for a lost one to come back
    hang_seconds: float | None = None  # without progress in a step; None: from the run's own step times

    def __post_init__(self) -> None:
        for name, count, least in (("nodes", self.nodes, 1), ("nproc", self.nproc, 1), ("restarts", self.restarts, 0)):
            if type(count) is not int or not least <= count <= _MOST_RANKS:
                raise ValueError(f"{name} is {str(count)[:40]!r}, which is no number from {least} to {_MOST_RANKS}")
        for name, fewest, most in (
            ("min_nproc", self.min_nproc, self.nproc),
            ("min_nodes", self.min_nodes, self.nodes),
        ):
            if fewest is not None and (type(fewest) is not int or not 1 <= fewest <= most):
                raise ValueError(f"{name} is {str(fewest)[:40]!r}, which is no number from 1 to {most}")
        for name, seconds in (
            ("grace_seconds", self.grace_seconds),
            ("join_seconds", self.join_seconds),
            ("rejoin_seconds", self.rejoin_seconds),
            ("hang_seconds", self.hang_seconds),
        ):
            if seconds is not None and (type(seconds) not in (int, float) or not 0 <= seconds <= _MOST_SECONDS):
                raise ValueError(f"{name} is {str(seconds)[:40]!r}, which is no time")
        words = {"run_id": self.run_id, "entry": self.entry} | {f"preload {word!r}": word for word in self.preload}
        for name, word in words.items():
            if not isinstance(word, str):
                raise ValueError(f"{name[:60]} is no word")
        if type(self.fork) is not bool:
            raise ValueError("fork is neither true nor false")


def job_text(job: Job, launcher: str) -> str:
    """The content of `job.json`."""
    values = {
        "run_id": job.run_id,
        "launcher": launcher,
        "nodes": job.nodes,
        "nproc": job.nproc,
        "preload": list(job.preload),
        "fork": job.fork,
        "recovery": asdict(job.recovery),
        "options": dict(job.options),
    }
    return json.dumps(values, indent=2) + "\n"


def read_job(run_dir: Path) -> AgentJob:
    """The job of a run's folder. Raises UserError where there is none."""
    path = run_dir / FILE
    values = read_record(path)
    if values is None:
        raise UserError(f"{run_dir} has no {FILE}, so it is not the folder of a run")
    try:
        options, recovery = values["options"], values.get("recovery", {})
        return AgentJob(
            run_id=values["run_id"],
            nodes=values["nodes"],
            nproc=values["nproc"],
            preload=tuple(values["preload"]),
            fork=values["fork"],
            min_nproc=options.get("min_nproc"),
            min_nodes=options.get("min_nodes"),
            entry=options.get("entry", WORKER),
            grace_seconds=float(options.get("grace_seconds", AgentJob.grace_seconds)),
            join_seconds=float(options.get("join_seconds", AgentJob.join_seconds)),
            rejoin_seconds=float(options.get("rejoin_seconds", AgentJob.rejoin_seconds)),
            restarts=recovery.get("restarts", AgentJob.restarts),
            hang_seconds=recovery.get("hang_seconds"),
        )
    except (AttributeError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); launch the run anew") from error
