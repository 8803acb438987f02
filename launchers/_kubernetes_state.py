"""Which objects of a cluster are a run's job: kept in the run's folder, so that any shell finds them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unitrain.agent.local_job import STATE
from unitrain.agent.records import read_record, write_record
from unitrain.errors import ExitCode, UserError
from unitrain.launcher import JobStatus
from unitrain.launchers._kubernetes_kinds import KINDS
from unitrain.launchers._kubernetes_options import Wishes
from unitrain.run import Run

LAUNCHER = "kubernetes"
STOPPED = 143  # 128 + SIGTERM, as a shell counts
KEPT = ("kubeconfig", "context", "namespace", "volume", "python", "grace_seconds")  # options that are needed later


@dataclass(frozen=True, kw_only=True)
class State:
    """What `job-state.json` keeps of a submission."""

    job_id: str
    submitted: float
    attempt: int  # the first one that can be this submission's
    number: int  # of submissions before
    nodes: int
    kind: str
    names: tuple[str, ...]  # of the objects that run pods
    options: Mapping[str, Any]  # by which the cluster and the folder are found
    pod_dir: str
    cancelled: float | None = None
    exit_code: int | None = None
    error: str = ""

    @classmethod
    def read(cls, run_dir: Path, job_id: str | None = None) -> State:
        """Raises UserError where no job was started, or another one was."""
        values = read_record(run_dir / STATE)
        if values is None:
            raise UserError(f"no job was started in {run_dir}; start one with unitrain launch")
        try:
            names = {key: value for key, value in values.items() if key != "launcher"}
            state = cls(**{**names, "names": tuple(values["names"])})
            if state.kind not in KINDS or "/" not in state.job_id:
                raise ValueError(f"no kind {state.kind!r} is known")
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{run_dir / STATE} is damaged: {error}; start the run anew") from error
        if job_id is not None and state.job_id != job_id:
            raise UserError(f"{run_dir} has no job {job_id!r}; its newest is {state.job_id}")
        return state

    def write(self, run_dir: Path) -> None:
        """Keep it."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        write_record(run_dir / STATE, launcher=LAUNCHER, **{**values, "options": dict(self.options)})

    @property
    def name(self) -> str:
        """Of the objects."""
        return self.job_id.partition("/")[2]

    @property
    def wishes(self) -> Wishes:
        """As far as the cluster and the folder are concerned."""
        return Wishes.of({"image": "", **self.options})


def submissions(run_dir: Path) -> int:
    """How often the run was submitted before: objects of another submission have another name."""
    launches = [event for event in Run(run_dir).events() if event["event"] == "launch"]
    told: int = sum(event.get("launcher") == LAUNCHER for event in launches)
    values = read_record(run_dir / STATE)
    kept = values is not None and values.get("launcher") == LAUNCHER
    return max(told, State.read(run_dir).number + 1 if kept else 0)


def status_of(state: State) -> JobStatus:
    """Of a job whose end is known."""
    code: Any = state.exit_code
    if code == STOPPED:
        return JobStatus("cancelled", code, "stopped by SIGTERM")
    states = {ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted"}
    return JobStatus(states.get(code, "failed"), code, state.error)
