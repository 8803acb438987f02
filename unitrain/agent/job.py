"""What `job.json` tells an agent: the shape of the run and how a rank begins."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..launcher import Job  # not at run time: it imports numpy, and an agent must start in milliseconds

FILE = "job.json"
WORKER = "unitrain.worker:main"


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
    restarts: int = 0  # failed attempts in a row without a newer checkpoint that end the run; 0: the first one does
    hang_seconds: float | None = None  # without progress in a step; None: from the run's own step times


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
    try:
        values = json.loads(path.read_text())
        options, recovery = values["options"], values.get("recovery", {})
        return AgentJob(
            run_id=values["run_id"],
            nodes=values["nodes"],
            nproc=values["nproc"],
            preload=tuple(values["preload"]),
            fork=values["fork"],
            entry=options.get("entry", WORKER),
            grace_seconds=float(options.get("grace_seconds", AgentJob.grace_seconds)),
            restarts=recovery.get("restarts", AgentJob.restarts),
            hang_seconds=recovery.get("hang_seconds"),
        )
    except FileNotFoundError as error:
        raise UserError(f"{run_dir} has no {FILE}, so it is not the folder of a run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); launch the run anew") from error
