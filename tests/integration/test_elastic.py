"""A run goes on with fewer ranks where some are lost for good, and with all of them when they are back."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from unitrain.audit import audit
from unitrain.launcher import Job
from unitrain.launchers.torchrun import Torchrun
from unitrain.recipe_file import recipe_from_text
from unitrain.run import Run

from .runs import ROWS, curve, difference, events, launch, losses, metrics, trainer, unitrain
from .test_recovery import launched

STEPS = 60
SLOW = [trainer("Slow"), f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=7", "checkpoint.async=false"]
STEADY = "schedule={name: constant}"  # the same at a step whatever the number of steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


def test_a_run_shrinks_and_grows_between_kills_and_learns_the_same(folder: Path) -> None:
    curve(ROWS, folder / "whole", "ddp-2", *SLOW)
    run = folder / "resized"
    going = launched(run, "ddp-1:2", *SLOW).after(5)
    (run / "slots").write_text("1")
    going.signal(signal.SIGKILL, rank=1).after(16, attempts=2).signal(signal.SIGKILL, rank=0).after(23, attempts=3)
    (run / "slots").write_text("2\n")
    going.after(40, attempts=4).signal(signal.SIGKILL, rank=0)
    ended = going.ended().succeeded()
    assert [event["world_size"] for event in events(run, "start")] == [2, 1, 1, 2, 2]
    down, up = events(run, "resize")
    assert [(event["before"], event["ranks"]) for event in (down, up)] == [(2, 1), (1, 2)]
    assert events(run, "start")[3]["step"] == up["step"] == events(run, "leave")[0]["step"], "growing loses no step"
    assert "1 of 2 ranks go on from step" in ended.err
    assert len(events(run, "restart")) == 3
    assert difference(losses(run), losses(folder / "whole")) < 1e-5
    assert audit(Run(run)).problems == []
    # The mean number of a step's samples: each step has had its own, each once.
    numbers = [[record["number"] for record in metrics(path)] for path in (run, folder / "whole")]
    assert difference(*numbers) < 1e-6
    assert [record["samples"] for record in metrics(run)] == [10 * step for step in range(1, STEPS + 1)]


def test_a_slot_whose_ranks_never_come_to_life_is_left_out(folder: Path) -> None:
    run = folder / "lost"
    few = [*SLOW[2:], trainer("LostSlot"), "train.steps=20"]
    launch(ROWS, run, "ddp-1:2", *few).succeeded()
    assert [event["rank"] for event in events(run, "fault")] == [1, 1], "not a third time"
    (resize,) = events(run, "resize")
    assert (resize["before"], resize["ranks"], resize["step"]) == (2, 1, 0)
    assert len(losses(run)) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nproc", "3:2"], "'3:2' is neither a number"),
        (["--nproc", "1:2", "--launcher", "torchrun"], "has no option 'min_nproc'"),
        (["--nproc", "1:2", "checkpoint.every=0"], "checkpoint.every is 0"),
        (["--nodes", "1:2"], "has no option 'min_nodes'"),
        (["--nproc", "2", "launcher.options.min_nproc=3"], "min_nproc is 3 of launcher.nproc=2"),
    ],
)
def test_a_range_that_cannot_be_is_refused(folder: Path, options: list[str], message: str) -> None:
    (folder / "rows.yaml").write_text(ROWS)
    ended = unitrain("launch", "rows.yaml", *options, cwd=folder, COLUMNS="200")
    assert ended.code in (2, 78)
    assert message in ended.err


def test_torchrun_goes_on_with_one_node_of_two_and_with_both_again(folder: Path) -> None:
    # Saved behind the step: torchrun's agent hears of a lost node by its ranks alone, they by their next collective.
    run, few = folder / "torchrun", [*SLOW, "train.steps=3000", STEADY, "checkpoint.async=true"]
    Run.create(run, recipe_from_text(ROWS, overrides=["strategy={name: ddp}", *few]))
    options = {"min_nodes": 1, "max_restarts": 9, "local_addr": "127.0.0.1", "monitor_interval": 0.1}
    quick = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {"rdzv_endpoint": f"127.0.0.1:{port}", "rdzv_conf": quick}
    job = Job(run_id="run", run_dir=run, nodes=2, nproc=1, options={**options, **rendezvous})
    rendered = Torchrun().render(job)
    environ = {**os.environ, **rendered.environ, "OMP_NUM_THREADS": "1"}
    nodes: list[subprocess.Popen[bytes]] = []

    def join() -> subprocess.Popen[bytes]:
        argv = [word for word in rendered.argv if word != "--keep-logs"]
        nodes.append(subprocess.Popen(argv, env=environ, stdout=output, stderr=output, start_new_session=True))
        return nodes[-1]

    def until(ranks: int, after: int = 0) -> int:
        """A later start than that many has so many ranks, and gets on; how many starts there were."""
        deadline = time.monotonic() + 120
        while True:
            starts, records = events(run, "start"), metrics(run)
            there = len(starts) > after and starts[-1]["world_size"] == ranks
            if there and records and records[-1]["step"] >= starts[-1]["step"] + 5:
                return len(starts)
            assert time.monotonic() < deadline, (folder / "nodes.log").read_text()[-3000:]
            time.sleep(0.05)

    with (folder / "nodes.log").open("ab") as output:
        try:
            join()
            until_listening(port)  # the rendezvous is where the first one is, and it must not be the one that is lost
            lost = join()
            both = until(2)
            os.killpg(lost.pid, signal.SIGKILL)
            one = until(1, after=both)
            join()
            until(2, after=one)
        finally:
            for node in nodes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(node.pid, signal.SIGKILL)
                node.wait()
    begins = [event["step"] for event in events(run, "start")]
    left = [event["step"] for event in events(run, "preempt")]
    assert begins[-1] == left[-1], "who joins costs no step"
    assert [record["step"] for record in metrics(run)] == list(range(1, len(metrics(run)) + 1))
    whole = curve(ROWS, folder / "steady", "single-1", *SLOW, "train.steps=60", STEADY)
    assert difference(losses(run)[:60], whole) < 1e-5


def until_listening(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        assert time.monotonic() < deadline, "the first node never came up"
        time.sleep(0.05)
