"""The contract of a launcher: it starts one agent on each node, and knows nothing of strategies.

`render` is pure and `submit` runs precisely what it rendered, so that a dry run cannot lie. A job is found again from
any shell by the run's folder: job.json says what was asked, job-state.json which job it is, exit.json how it ended.
Resuming is another job in the same folder, by this launcher or another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .recipe import Recipe, RecoveryRecipe
from .strategy import Problem


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be started: a run's folder, its shape, and how a rank begins."""

    run_id: str
    run_dir: Path
    nodes: int
    nproc: int
    recipe: str = ""  # the text of the run's recipe.yaml, for launchers that carry it to where the folder is not
    options: Mapping[str, Any] = field(default_factory=dict)  # the launcher's own
    preload: tuple[str, ...] = ()  # modules that the warm process imports before it forks ranks
    fork: bool = True  # False: the framework starts threads at import, so ranks are spawned
    recovery: RecoveryRecipe = field(default_factory=RecoveryRecipe)  # what the agent does about ranks that die or hang


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Exactly what `submit` will write and run."""

    files: Mapping[str, str] = field(default_factory=dict)  # path below the run folder -> content
    argv: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)  # added to the submitter's own


@dataclass(frozen=True)
class JobStatus:
    """State of a job as its launcher sees it."""

    state: str  # pending | running | done | failed | preempted | cancelled | unknown
    exit_code: int | None = None
    detail: str = ""


class Launcher(ABC):
    """Starts agents somewhere. Entry-point group `unitrain.launchers`."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """Refusals, each with an alternative. Called before anything starts; needs nothing installed.

        What could leave its place in a script, a manifest or a command line is refused here.
        """

    @abstractmethod
    def render(self, job: Job) -> Rendered:
        """The files and the command line. Pure: the same for the same job, and it needs nothing installed."""

    @abstractmethod
    def submit(self, job: Job, rendered: Rendered) -> str:
        """Write the files below the run folder, start the command, return the job's id.

        Leaves job-state.json with at least `launcher`, `job_id` and `submitted` (Unix time), and takes an older
        exit.json away. Raises UserError with the system's own words where it is refused.
        """

    @abstractmethod
    def wait(self, job: Job, job_id: str) -> int:
        """Show rank 0's output until the job ends; the run's exit code, which the agent of node 0 has left."""

    @abstractmethod
    def status(self, run_dir: Path, job_id: str) -> JobStatus:
        """What became of the job, from any shell. Raises UserError for a job that is not this run's newest."""

    @abstractmethod
    def logs(self, run_dir: Path, *, rank: int = 0, follow: bool = False) -> Iterator[str]:
        """Lines of one rank's log, newest attempt; with `follow` until the job ends.

        Raises UserError, when it is called, for a rank without a log.
        """

    @abstractmethod
    def cancel(self, run_dir: Path, job_id: str, *, grace_seconds: float = 30.0) -> None:
        """Ask the job to stop, and end it when the grace is over; returns when nothing of it is left.

        A job that has ended already is left as it is.
        """
