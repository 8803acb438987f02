"""What one rank runs: `python -m unitrain.worker RECIPE_OR_RUN_DIR [key=value ...]`, under any starter or alone."""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .agent.failures import leave_failure
from .agent.logs import attempt_folders, rank_log
from .agent.rank import die_with, leave, line_buffered, skip_teardown, write_to
from .agent.records import hostname
from .agent.report import Failure, keep_capsule
from .errors import ExitCode, UnitrainError, type_name
from .heartbeat import Phase
from .world import World, environment

if TYPE_CHECKING:
    from .trainer import Trainer

_MOST_LETTERS = 60_000  # of an error and of its traceback, as they are told to the agent; the log has all


def main(argv: Sequence[str] | None = None) -> int:
    """Train as one rank of a run; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m unitrain.worker", description=__doc__)
    parser.add_argument("path", type=Path, metavar="RECIPE_OR_RUN_DIR", help="a recipe, or a run's folder")
    parser.add_argument("--run-dir", type=Path, help="the run's folder; made and named after the recipe unless given")
    parser.add_argument("--keep-logs", action="store_true", help="write the output to the logs of the run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    known = parser.parse_intermixed_args(argv)
    recipe_file = known.path / "recipe.yaml" if known.path.is_dir() else known.path
    run_dir = known.path if known.path.is_dir() and known.run_dir is None else known.run_dir
    if run_dir is not None:
        run_dir = run_dir.absolute()  # a rank may go into the run's own copy of the code

    def build() -> Trainer:
        from . import registry
        from .keras_backend import settle_keras
        from .recipe_file import load_recipe
        from .trainer_path import resolve_trainer

        recipe = load_recipe(recipe_file, known.overrides)
        refuse_others = None
        if recipe.code.snapshot and run_dir is not None:
            from .snapshot import enter

            refuse_others = enter(run_dir)
        # Before the trainer's file, which may import Keras.
        settle_keras(registry.framework_of(recipe.strategy))
        registry.prepare(recipe.strategy.name)
        trainer = resolve_trainer(recipe.trainer, beside=recipe_file.parent)
        if refuse_others is not None:
            refuse_others()
        return trainer(recipe, run_dir=run_dir)

    return train(build, run_dir, keep_logs=known.keep_logs)


def train(build: Callable[[], Trainer], run_dir: Path | None, *, keep_logs: bool = False) -> int:
    """Build a trainer and train; an error becomes a report and an exit code."""
    faulthandler.enable(2)  # where C code crashes, the log still says which Python line was running
    world, trainer = World(), None
    try:
        world = World.from_environment()
        if world.stacks is not None:
            # By C code in the signal handler itself: it also speaks of a rank that hangs in C code or holds the GIL.
            faulthandler.register(signal.SIGQUIT, open(world.stacks, "w"), all_threads=True)  # noqa: SIM115
        world.beat(Phase.STARTING, 0)
        if world.starter in ("torchrun", "mpirun"):
            die_with(os.getppid(), signal.SIGKILL)  # these, when killed, may leave their workers running
        if keep_logs and run_dir is not None:
            _log_to(run_dir, world)
        trainer = build()
        return trainer.fit().exit_code
    except UnitrainError as error:
        return _fail(error, world, run_dir, error.exit_code, trainer, expected=True)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            return ExitCode.DONE
        return _fail(error, world, run_dir, ExitCode.FAILED, trainer, expected=False)


def _log_to(run_dir: Path, world: World) -> None:
    """Send this rank's output to its file among the logs of the newest attempt."""
    folders = attempt_folders(run_dir)
    if not folders:  # the launcher made it, but not on this node's disk
        (run_dir / "logs" / "attempt-0").mkdir(parents=True, exist_ok=True)
        folders = attempt_folders(run_dir)
    write_to(str(rank_log(folders[-1], world.rank)))
    sys.stdout, sys.stderr = line_buffered(1), line_buffered(2)


def _fail(
    error: BaseException, world: World, run_dir: Path | None, exit_code: int, trainer: Trainer | None, *, expected: bool
) -> int:
    """Tell the agent, or leave a record for the launcher; then write it to the log. Expected: without a traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    text = "" if expected else "".join(traceback.format_exception(error))
    output = os.fstat(2)
    account = {
        "rank": world.rank,
        "pid": os.getpid(),
        "host": hostname(),
        "type": type_name(type(error)),
        "message": str(error)[:_MOST_LETTERS],
        "traceback": text[-_MOST_LETTERS:],
        "exit_code": int(exit_code),
        "monotonic": time.monotonic(),
        "time": time.time(),
        "log_size": output.st_size if stat.S_ISREG(output.st_mode) else None,
        "retry": getattr(error, "retry", True) is not False,
        "account": None,
    }
    try:
        account["account"] = None if trainer is None else trainer.failure_account()
    except Exception as another:  # the run's own failure must be told, whatever has become of the Trainer
        account["account_error"] = f"{type_name(type(another))}: {another}"
    # Before it is printed: the agent then knows from where on rank 0's log repeats what it will say itself.
    world.tell_agent(kind="error", **account)
    if world.agent_fd is None and run_dir is not None and run_dir.is_dir():
        leave_failure(run_dir, account)
    if world.starter == "alone" and trainer is not None and trainer.run is not None:
        failure = Failure.from_message(account, Path(os.devnull))
        keep_capsule(failure, trainer.run.folder, environment())
    print(text.rstrip() or error, file=sys.stderr, flush=True)
    return exit_code


if __name__ == "__main__":
    skip_teardown()
    leave(main())
