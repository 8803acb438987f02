"""Ranks of many strategies at the price of a few starts of Python: what each needs is imported once, and ranks forked.

`python forked.py TASK` forks the ranks of one shape (a strategy on a number of ranks) after the other, and lets each
call a function `part(folder, act, shape)` of the test, whose result it writes down.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from unitrain import registry
from unitrain.agent.rank import die_with, write_to

RANK_SECONDS, TASK_SECONDS = 900, 1500
MOST_SHAPES = 8  # of one process
OWN_THREADS = Path("/proc/self/task")


class Shape(NamedTuple):
    """A strategy on a number of ranks."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy}-{self.ranks}"

    @classmethod
    def of(cls, text: str) -> Shape:
        """The shape that is written so."""
        strategy, _, ranks = text.rpartition("-")
        return cls(strategy, int(ranks))


Found = dict[Shape, list[Any] | str]  # what the ranks of a shape found, or how they failed


def run_shapes(part: str, folder: Path, act: str, shapes: list[Shape], *, preload: Sequence[str] = ()) -> Found:
    """Let the ranks of each shape do their part, module:function, two shapes at a time.

    `preload` names what to import beside what the strategies need.
    """
    found: Found = {}
    with ThreadPoolExecutor(2) as pool:  # most of their time ranks wait for each other
        tasks = [
            {"part": part, "folder": str(folder), "act": act, "preload": [*modules, *preload], "shapes": group}
            for modules, group in _together(shapes)
        ]
        for results in pool.map(lambda numbered: _run_task(*numbered), enumerate(tasks)):
            found.update(results)
    return found


def _together(shapes: list[Shape]) -> Iterator[tuple[tuple[str, ...], list[Shape]]]:
    """Shapes that need the same modules, a few at a time."""
    groups: dict[tuple[str, ...], list[Shape]] = {}
    for shape in shapes:
        groups.setdefault(registry.entry("strategies", shape.strategy).preload, []).append(shape)
    for modules, group in groups.items():
        parts = -(-len(group) // MOST_SHAPES)
        yield from ((modules, group[number::parts]) for number in range(parts))


def _run_task(number: int, task: dict[str, Any]) -> Found:
    folder, act = Path(task["folder"]), task["act"]
    path = folder / f"{act}-{number}.json"
    path.write_text(json.dumps(task))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TASK_SECONDS, check=False)
    found: Found = {}
    for shape in task["shapes"]:
        files = [folder / f"{act}-{shape}-{rank}.json" for rank in range(shape.ranks)]
        if done.returncode or not all(file.exists() for file in files):
            logs = [file.with_suffix(".log") for file in files]
            said = [log.read_text()[-3000:] for log in logs if log.exists()]
            found[shape] = "\n".join([f"{shape} failed to {act}", done.stdout, done.stderr, *said])
        else:
            found[shape] = [json.loads(file.read_text()) for file in files]
    return found


def main() -> None:
    """Run a task: all ranks of a shape at once, one shape after the other."""
    task = json.loads(Path(sys.argv[1]).read_text())
    for module in task["preload"]:
        importlib.import_module(module)
    if "deepspeed" in sys.modules:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # else every rank does, for seconds
    gc.freeze()  # DeepSpeed collects garbage at every turn
    threads = len(list(OWN_THREADS.iterdir()))
    if threads != 1:
        raise SystemExit(f"{task['preload']} start threads ({threads}), so that ranks cannot be forked here")
    for shape in (Shape(*values) for values in task["shapes"]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = [_fork(task, shape, rank, port) for rank in range(shape.ranks)]
        for pid in pids:
            os.waitpid(pid, 0)  # its result file tells whether it succeeded


def _fork(task: dict[str, Any], shape: Shape, rank: int, port: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(task, shape, rank, port, parent)
    return pid


def _become(task: dict[str, Any], shape: Shape, rank: int, port: int, parent: int) -> NoReturn:
    code = 1
    try:
        die_with(parent, signal.SIGKILL)
        signal.alarm(RANK_SECONDS)
        faulthandler.enable()  # the log says where a rank crashed, or for what it waited in vain
        faulthandler.dump_traceback_later(RANK_SECONDS * 0.95)
        folder, act = Path(task["folder"]), task["act"]
        write_to(str(folder / f"{act}-{shape}-{rank}.log"))
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(shape.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(shape.ranks))
        found = registry.resolve(task["part"])(folder, act, shape)
        (folder / f"{act}-{shape}-{rank}.json").write_text(json.dumps(found))
        atexit._run_exitfuncs()  # Horovod's, say
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
