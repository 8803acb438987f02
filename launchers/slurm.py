"""A batch job of Slurm: one agent on each node, started again until the run is done."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unitrain.agent.job import FILE, job_text
from unitrain.agent.local_job import STATE
from unitrain.agent.logs import attempt_number, find_log, log_lines, new_attempt, no_log
from unitrain.agent.records import EXIT, read_record, write_record
from unitrain.agent.screen import say
from unitrain.errors import ExitCode, UnitrainError, UserError
from unitrain.launcher import Job, JobStatus, Launcher, Rendered
from unitrain.launchers._slurm_options import (
    DIRECTIVES,
    MAX_REQUEUES,
    WARN_SECONDS,
    extra_directive,
    name_text,
    option_problems,
    path_text,
)
from unitrain.launchers._slurm_queue import Queue, status_of
from unitrain.recipe import Recipe
from unitrain.recipe_file import refuse_problems
from unitrain.strategy import Problem
from unitrain.world import environment

SCRIPT = "slurm.sh"
EVERY_RUN = Path(__file__).with_name("slurm.sh")  # the part of the script that is the same for all
_CANCELLED = 143  # 128 + SIGTERM, as shells have it
_FINAL = (ExitCode.DONE, ExitCode.FAILED, ExitCode.BAD_RECIPE, ExitCode.CRASH_LOOP)  # no job goes on after these
_KILL_SECONDS = 120.0  # by then Slurm has ended a job that it was told to end


class Slurm(Launcher):
    """`sbatch` now, `squeue` and `sacct` later; what they do not know is read from the run's folder."""

    name = "slurm"

    @classmethod
    def problems(cls, recipe: Recipe) -> list[Problem]:
        """Options that Slurm or we do not have, and values that could mean something else in a script."""
        problems = option_problems(recipe.launcher.options, recipe.launcher.nodes)
        if recipe.checkpoint.every == 0 and recipe.launcher.options.get("requeue", True) is True:
            what = "a job that is started again goes on from a checkpoint, and checkpoint.every is 0"
            problems.append(Problem(what, "set checkpoint.every, or launcher.options.requeue=false"))
        return problems

    def render(self, job: Job) -> Rendered:
        """The job for the agents, the batch script, and `sbatch`. Raises Refused for names that no script can hold."""
        _refuse([job])
        script = _script(job, [job.run_dir], log=job.run_dir / "slurm-%j.log", name=job.run_id)
        argv = ("sbatch", "--parsable", str(job.run_dir / SCRIPT))
        return Rendered(files={FILE: job_text(job, self.name), SCRIPT: script}, argv=argv)

    def render_array(self, jobs: Sequence[Job], folder: Path) -> Rendered:
        """The same for runs that differ in their recipes only, as one job array.

        `folder` holds the script and Slurm's logs and stands beside the runs' own folders.
        """
        _refuse(jobs)
        first = jobs[0]
        shapes = {(job.nodes, job.nproc, repr(sorted(job.options.items()))) for job in jobs}
        if len(shapes) > 1:
            raise UserError("the runs of a job array ask for the same nodes; sweep over what is not under launcher")
        parallel = first.options.get("max_parallel")
        array = f"0-{len(jobs) - 1}" + (f"%{parallel}" if parallel else "")
        log = folder / "slurm-%A_%a.log"
        script = _script(first, [job.run_dir for job in jobs], log=log, name=folder.name, array=array)
        files = {f"../{job.run_dir.name}/{FILE}": job_text(job, self.name) for job in jobs}
        return Rendered(files={**files, SCRIPT: script}, argv=("sbatch", "--parsable", str(folder / SCRIPT)))

    def submit(self, job: Job, rendered: Rendered) -> str:
        """Write the files and hand the script to Slurm, which gives the job its id."""
        for path, content in rendered.files.items():
            (job.run_dir / path).write_text(content)
        attempt = _prepare(job)
        job_id = _sbatch(rendered.argv)
        _keep(job, job_id, attempt)
        return job_id

    def submit_array(self, jobs: Sequence[Job], folder: Path, rendered: Rendered) -> list[str]:
        """The same for an array; one id for each run."""
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in rendered.files.items():
            (folder / path).write_text(content)
        attempts = [_prepare(job) for job in jobs]
        array = _sbatch(rendered.argv)
        ids = [f"{array}_{number}" for number in range(len(jobs))]
        for job, job_id, attempt in zip(jobs, ids, attempts, strict=True):
            _keep(job, job_id, attempt)
        return ids

    def wait(self, job: Job, job_id: str) -> int:
        """Follow rank 0's log until the job has ended and is not started again; its exit code."""
        watch = _Watch(job.run_dir, job_id, aloud=True)
        since = _state(job.run_dir, job_id)["attempt"]
        for line in log_lines(lambda: find_log(job.run_dir, 0, since_attempt=since), watch.ended, follow=True):
            print(line, flush=True)
        status = watch.status
        if status.state not in ("done", "preempted", "cancelled"):
            say(f"job {job_id} {status.state}; what its agents said: {_log(job.run_dir, job_id)}")
            say(status.detail)
        elif status.state == "cancelled":
            say(f"job {job_id} was cancelled ({status.detail})")
        codes = {"done": ExitCode.DONE, "preempted": ExitCode.PREEMPTED, "cancelled": _CANCELLED}
        return codes.get(status.state, ExitCode.FAILED) if status.exit_code is None else status.exit_code

    def status(self, run_dir: Path, job_id: str) -> JobStatus:
        """From squeue, then from sacct, then from what the agents have left."""
        state, left = _state(run_dir, job_id), read_record(run_dir / EXIT)
        try:
            seen = Queue().look(job_id)
        except UnitrainError as error:  # no Slurm here, or it does not answer
            code = None if left is None else left.get("exit_code")
            if code not in _FINAL and "cancelled" not in state:
                return JobStatus("unknown", detail=str(error))
            seen = None
        return status_of(seen, left, cancelled="cancelled" in state)

    def logs(self, run_dir: Path, *, rank: int = 0, follow: bool = False) -> Iterator[str]:
        """From the files that the ranks of all nodes write into the run's folder."""
        state = _state(run_dir)
        watch = _Watch(run_dir, state["job_id"])
        running = not watch.ended()
        since = state["attempt"] if running else 0
        if not running and find_log(run_dir, rank) is None:
            raise no_log(run_dir, rank)
        return log_lines(lambda: find_log(run_dir, rank, since_attempt=since), watch.ended, follow=follow and running)

    def cancel(self, run_dir: Path, job_id: str, *, grace_seconds: float = 30.0) -> None:
        """SIGTERM to the agents, which save; then scancel, which also keeps the job from being started again."""
        queue, state = Queue(), _state(run_dir, job_id)
        seen = queue.look(job_id)
        if seen is None or seen.ended:
            return
        # The script reads this, and then neither starts the agents nor requeues the job.
        write_record(run_dir / STATE, **{**state, "cancelled": time.time()})
        deadline = time.monotonic() + grace_seconds
        while seen is not None and seen.running and time.monotonic() < deadline:
            queue.signal(job_id, "TERM")  # again and again: the agents may be about to start
            seen = queue.wait_for_change(job_id, seen, until=min(deadline, time.monotonic() + 2))
        queue.cancel(job_id)
        deadline = time.monotonic() + _KILL_SECONDS
        while (seen := queue.look(job_id)) is not None and not seen.ended:
            if time.monotonic() > deadline:
                raise UnitrainError(
                    f"job {job_id} is still {seen.state} {_KILL_SECONDS:.0f} s after scancel; see squeue"
                )
            time.sleep(0.5)


# --- rendering ---------------------------------------------------------------------------------------------------


def _refuse(jobs: Sequence[Job]) -> None:
    """Raise Refused with all that cannot stand in a script."""
    problems = option_problems(jobs[0].options, jobs[0].nodes)
    for job in jobs:
        for what, value, text in (("folder", str(job.run_dir), path_text), ("id", job.run_id, name_text)):
            try:
                text(value)
            except ValueError as error:
                problems.append(Problem(f"the run's {what} is {value[:200]!r}", f"give {error}"))
    refuse_problems(problems)


def _script(job: Job, run_dirs: Sequence[Path], *, log: Path, name: str, array: str = "") -> str:
    """The batch script: directives, what belongs to this run, and the part that all runs share."""
    lines = [f"#SBATCH --{flag}{f'={_quoted(value)}' if value else ''}" for flag, value in _directives(job, array)]
    lines.insert(0, f"#SBATCH --job-name={name}")
    lines.append(f"#SBATCH --output={_quoted(str(log))}")
    options, shell = job.options, {}
    if array:
        folders = " ".join(shlex.quote(str(path)) for path in run_dirs)
        lines += ["", f"RUN_DIRS=({folders})", "RUN_DIR=${RUN_DIRS[SLURM_ARRAY_TASK_ID]}"]
    else:
        lines += ["", f"RUN_DIR={shlex.quote(str(run_dirs[0]))}"]
    shell["NODES"] = str(job.nodes)
    shell["REQUEUE"] = "yes" if options.get("requeue", True) else "no"
    shell["MAX_REQUEUES"] = str(options.get("max_requeues", MAX_REQUEUES))
    shell["SETUP"] = str(options.get("setup", ""))
    lines += [f"{key}={shlex.quote(value)}" for key, value in shell.items()]
    lines += ["SRUN=(", *(f"  {line}" for line in _srun(job)), ")", f"AGENT=({_agent(job)})", "", ""]
    return "\n".join(["#!/bin/bash", *lines]) + EVERY_RUN.read_text()


def _directives(job: Job, array: str) -> Iterator[tuple[str, str]]:
    """sbatch's options and their values; a value is empty where the option alone says it."""
    options = job.options
    yield "nodes", str(job.nodes)
    yield "ntasks-per-node", "1"
    if "cpus_per_task" not in options and "exclusive" not in options:
        yield "cpus-per-task", str(job.nproc)
    for key, found in DIRECTIVES.items():
        if key in options:
            yield found.flag, found.text(options[key])
    if "dependency" in options:
        yield "kill-on-invalid-dep", "yes"
    for word in options.get("directives", ()):
        flag, _, value = extra_directive(word).removeprefix("--").partition("=")
        yield flag, value
    if array:
        yield "array", array
    if options.get("min_nodes", job.nodes) < job.nodes:
        yield "no-kill", ""  # the others go on where a node is lost
    yield "requeue" if options.get("requeue", True) else "no-requeue", ""
    yield "open-mode", "append"  # a start must not empty the log of the one before
    yield "signal", f"B:USR1@{options.get('warn_seconds', WARN_SECONDS)}"


def _srun(job: Job) -> list[str]:
    """The command that starts an agent on each node, as lines of words of a shell."""
    lines = [
        f"srun --nodes={job.nodes} --ntasks={job.nodes} --ntasks-per-node=1",
        # The agents notice for themselves when one is lost; none may be killed while it saves.
        "--kill-on-bad-exit=0 --wait=0",
        "--mpi=none --cpu-bind=none --input=none --export=ALL",
    ]
    if job.options.get("min_nodes", job.nodes) < job.nodes:
        lines.append("--no-kill")
    image = job.options.get("container_image")
    if image is not None and not _apptainer(image):
        mounts = ",".join(path if ":" in path else f"{path}:{path}" for path in _mounts(job))
        lines.append(shlex.quote(f"--container-image={image}"))
        lines.append(f'--container-mounts={shlex.quote(mounts)},"$PWD:$PWD" --container-workdir="$PWD"')
    return lines


def _agent(job: Job) -> str:
    """The command of an agent, as words of a shell."""
    image = job.options.get("container_image")
    python = job.options.get("python", sys.executable if image is None else "python")
    agent = [shlex.quote(python), "-m", "unitrain.agent"]
    if image is None or not _apptainer(image):
        return " ".join(agent)
    gpus = ["--nv"] if "gpus_per_node" in job.options or "gpu" in job.options.get("gres", "") else []
    mounts = [word for path in _mounts(job) for word in ("--bind", shlex.quote(path))]
    return " ".join(["apptainer", "exec", *gpus, *mounts, '--bind "$PWD" --pwd "$PWD"', shlex.quote(image), *agent])


def _mounts(job: Job) -> list[str]:
    return [str(job.run_dir.parent), *job.options.get("container_mounts", ())]


def _apptainer(image: str) -> bool:
    return image.endswith(".sif")


def _quoted(value: str) -> str:
    """A value as sbatch reads it in a directive; what would end the quotes has been refused."""
    return value if re.fullmatch(r"[\w./:,@%+=-]+", value) else f'"{value}"'


# --- submitting --------------------------------------------------------------------------------------------------


def _prepare(job: Job) -> int:
    """Forget the job before; the number of the attempt that is to come."""
    setup = job.options.get("setup")
    if setup is not None and not Path(setup).is_file():
        raise UserError(f"launcher.options.setup is {setup!r}, and there is no such file in {Path.cwd()}")
    (job.run_dir / STATE).unlink(missing_ok=True)  # the new job must not read there that the old one was cancelled
    (job.run_dir / EXIT).unlink(missing_ok=True)
    return attempt_number(new_attempt(job.run_dir))


def _sbatch(argv: Sequence[str]) -> str:
    """Submit; the job's id. Raises UserError with what sbatch says."""
    if shutil.which(argv[0]) is None:
        raise UserError("there is no sbatch here: launch on a login node of the cluster, or use --dry-run")
    done = subprocess.run(argv, env=_environ(), capture_output=True, text=True, check=False)
    if done.returncode:
        words = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines()) or "without a word"
        raise UserError(f"sbatch refuses the job: {words}")
    if not re.fullmatch(r"\d+", job_id := done.stdout.strip().partition(";")[0]):
        raise UnitrainError(f"sbatch should have said the number of a job, and said {done.stdout[:200]!r}")
    return job_id


def _keep(job: Job, job_id: str, attempt: int) -> None:
    """Say which job it is."""
    write_record(job.run_dir / STATE, launcher=Slurm.name, job_id=job_id, submitted=time.time(), attempt=attempt)


def _environ() -> dict[str, str]:
    """The variables that the job inherits: without those by which Slurm would change what was rendered.

    SBATCH_* come before directives; SLURM_* and SRUN_* of an allocation that we stand in contradict the job's own.
    """
    ours = {name: value for name, value in environment().items() if not name.startswith(("SBATCH_", "SLURM_", "SRUN_"))}
    return ours | {name: value for name, value in environment().items() if name in ("SLURM_CONF", "SLURM_JWT")}


# --- following ---------------------------------------------------------------------------------------------------


class _Watch:
    """Asks for a job's state now and then: squeue is no toy where thousands of jobs run."""

    def __init__(self, run_dir: Path, job_id: str, *, aloud: bool = False) -> None:
        self._run_dir, self._job_id, self._aloud = run_dir, job_id, aloud
        self.status = JobStatus("unknown")
        self._next, self._pause, self._left = 0.0, 0.5, False

    def ended(self) -> bool:
        """True once the job is over and will not be started again."""
        left = (self._run_dir / EXIT).exists()
        if left != self._left:  # an attempt has begun or ended
            self._left, self._next, self._pause = left, 0.0, 0.5
        if time.monotonic() >= self._next:
            self._ask()
            self._next = time.monotonic() + self._pause
            self._pause = min(self._pause * 1.5, 5.0)
        return self.status.state not in ("pending", "running", "unknown")

    def _ask(self) -> None:
        before, self.status = self.status, Slurm().status(self._run_dir, self._job_id)
        if self._aloud and self.status.state == "pending" and before != self.status:
            say(f"job {self._job_id} is pending: {self.status.detail}")


def _state(run_dir: Path, job_id: str | None = None) -> dict[str, Any]:
    """launcher, job_id, submitted (Unix time), attempt, and cancelled (Unix time) once somebody did.

    Raises UserError where there is no such job.
    """
    state = read_record(run_dir / STATE)
    if state is None:
        raise UserError(f"no job was started in {run_dir}; start one with unitrain launch")
    kinds = {"job_id": str, "submitted": float, "attempt": int}
    odd = [key for key, kind in kinds.items() if type(state.get(key)) is not kind]
    if odd or not re.fullmatch(r"\d+(_\d+)?", state["job_id"]):
        raise UserError(f"{run_dir / STATE} is damaged: its {(odd or ['job_id'])[0]} is none; start the run anew")
    if job_id is not None and state["job_id"] != job_id:
        raise UserError(f"{run_dir} has no job {job_id!r}; its newest is {state['job_id']}")
    return state


def _log(run_dir: Path, job_id: str) -> Path:
    """Where Slurm keeps what the script and the agents say."""
    own = run_dir / f"slurm-{job_id}.log"
    others = sorted(run_dir.parent.glob(f"*/slurm-{job_id}.log"))  # of an array, beside
    return own if own.exists() or not others else others[0]
