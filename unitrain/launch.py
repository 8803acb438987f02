"""`unitrain.launch`: several ranks from a script or a notebook, with one call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .agent.job import FILE, job_text, read_job
from .agent.records import EXIT, read_record
from .agent.screen import Stream
from .agent.signals import STOPPING
from .agent.starters import Forks
from .agent.supervise import Agent
from .errors import ExitCode, RankFailed, UserError
from .recipe import Recipe
from .recipe_file import load_recipe
from .run import Run
from .submission import ask, job_of, prepare, submit
from .trainer import Result, Trainer
from .worker import train
from .world import World


def launch(
    trainer: type[Trainer],
    recipe: str | Path,
    *,
    nproc: int = 1,
    strategy: str | None = None,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Result:
    """Train on `nproc` ranks of this machine and wait for the end; a folder that holds a run already is gone on with.

    A class in a module or a script is imported by new processes; one that was defined in a notebook's cell runs in
    forks of the notebook, with one CPU thread each. Raises RankFailed with the first failing rank's error, and
    UserErrors before anything starts.
    """
    if World.from_environment().starter != "alone":
        raise UserError(
            "unitrain.launch was called by a rank of a run; in a script, put it below `if __name__ == '__main__':`"
        )
    path = importable_path(trainer)
    here = [
        f"launcher={{name: local, nproc: {nproc}}}",
        f"trainer='{path or f'{trainer.__module__}:{trainer.__qualname__}'}'",
    ]
    loaded = load_recipe(recipe, [*here, *overrides], strategy=strategy)
    if path is None:
        _refuse_cuda()
        if loaded.code.snapshot:
            raise UserError(f"code.snapshot copies files, and {trainer.__name__} is in none; move it into a .py file")
        run = _run(run_dir, loaded)
        code = _launch_forks(run, trainer, loaded)
    else:
        run, code = _launch_processes(run_dir, loaded)
    if code in {128 + number for number in STOPPING}:
        raise KeyboardInterrupt
    if code not in (ExitCode.DONE, ExitCode.PREEMPTED):
        ended = read_record(run.folder / EXIT) or {}
        raise RankFailed(f"{ended.get('error', 'the agent failed')} (see {run.folder})", ExitCode(code))
    return _result(run, code)


def importable_path(trainer: type) -> str | None:
    """`module:Class` or `file.py:Class` by which another process finds the class; None where it cannot."""
    module = sys.modules.get(trainer.__module__)
    if getattr(module, trainer.__qualname__, None) is not trainer:
        return None  # made inside a function, or defined anew since
    name, file = trainer.__module__, getattr(module, "__file__", None)
    top = name.partition(".")[0]
    if name != "__main__" and any(_finds(finder, top) for finder in sys.meta_path):
        return f"{name}:{trainer.__qualname__}"
    return f"{Path(file).resolve()}:{trainer.__qualname__}" if file and Path(file).suffix == ".py" else None


def _finds(finder: Any, name: str) -> bool:
    return hasattr(finder, "find_spec") and finder.find_spec(name, None) is not None


def _refuse_cuda() -> None:
    torch: Any = sys.modules.get("torch")  # not imported here: what nobody imported has not touched CUDA
    if torch is not None and torch.cuda.is_initialized():
        raise UserError(
            "this process has used CUDA, and forks of it cannot; restart the kernel and launch first, or move the "
            "Trainer into a .py file"
        )


def _run(run_dir: str | Path | None, recipe: Recipe) -> Run:
    if run_dir is None or not Run.exists(run_dir):
        return Run.create(run_dir, recipe)
    run = Run.open(run_dir)
    run.rewrite_recipe(recipe)
    return run


def _launch_processes(run_dir: str | Path | None, recipe: Recipe) -> tuple[Run, int]:
    recipe, code = ask(recipe, None if run_dir is None else Path(run_dir))
    run = _run(run_dir, recipe)
    submission = prepare(run, recipe, code)
    return run, submission.launcher.wait(submission.job, submit(submission))


def _launch_forks(run: Run, trainer: type[Trainer], recipe: Recipe) -> int:
    (run.folder / FILE).write_text(job_text(job_of(run, recipe), "local"))
    # One thread: a fork of a process whose OpenMP threads have worked hangs where it wants more.
    agent = Agent(read_job(run.folder), run.folder, Stream(), environ={"OMP_NUM_THREADS": "1"})
    forks = Forks(lambda: train(lambda: trainer(recipe, run_dir=run.folder), run.folder))
    return agent.run(lambda logs: [forks])


def _result(run: Run, exit_code: int) -> Result:
    """What the run's files say."""
    last: dict[str, dict[str, Any]] = {}
    for record in run.metrics():
        last[record["split"]] = record
    metrics, evaluation = last.get("train", {}), last.get("eval", {})
    own = {key: value for key, value in evaluation.items() if key not in ("step", "split", "seconds")}
    return Result(run.folder, metrics.get("step", 0), metrics, own, exit_code)
