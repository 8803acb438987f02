"""Agents of several nodes run one job: they start ranks together, lose and regain nodes, and end with one answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unitrain.agent.job import job_text
from unitrain.agent.records import Process, read_record
from unitrain.agent.wire import KEY
from unitrain.audit import audit
from unitrain.launcher import Job
from unitrain.meeting import free_port
from unitrain.recipe_file import recipe_from_text
from unitrain.run import Run

from .runs import ROWS, Ended, curve, difference, events, losses, metrics, trainer

STEPS = 60
SLOW = [trainer("Slow"), f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=7", "checkpoint.async=false"]


class Nodes:
    """One run of which every node is an agent of this machine."""

    def __init__(self, folder: Path, *overrides: str, nodes: int = 2, nproc: int = 1, **options: Any) -> None:
        self.folder, self.port = folder, free_port("127.0.0.1")
        recipe = recipe_from_text(ROWS, overrides=["strategy={name: ddp}", *SLOW, *overrides])
        Run.create(folder, recipe)
        job = Job(
            run_id=folder.name,
            run_dir=folder,
            nodes=nodes,
            nproc=nproc,
            options={"join_seconds": 30, "rejoin_seconds": 30, **options},
            preload=("torch", "unitrain.trainer", "unitrain.worker"),
            recovery=recipe.recovery,
        )
        (folder / "job.json").write_text(job_text(job, "test"))
        self.agents: list[subprocess.Popen[str]] = []

    def start(self, *nodes: int, run_dir: Path | None = None) -> Nodes:
        """Start the agents of these nodes."""
        for node in nodes:
            command = [sys.executable, "-m", "unitrain.agent", str(run_dir or self.folder), "--node", str(node)]
            pipe = subprocess.PIPE
            agent = subprocess.Popen(
                [*command, "--meet", f"127.0.0.1:{self.port}"],
                cwd=self.folder.parent,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=pipe,
                stderr=pipe,
                text=True,
            )
            self.agents.append(agent)
        return self

    def after(self, step: int, *, attempts: int = 1) -> Nodes:
        """As soon as a step is logged by that many attempts."""
        deadline = time.monotonic() + 60
        while len(events(self.folder, "start")) < attempts or self.step < step:
            assert any(agent.poll() is None for agent in self.agents), [self.ended(n) for n in range(len(self.agents))]
            assert time.monotonic() < deadline, f"it never reached step {step} in attempt {attempts}"
            time.sleep(0.002)
        return self

    @property
    def step(self) -> int:
        records = metrics(self.folder)
        return int(records[-1]["step"]) if records else 0

    def rank(self, rank: int, *, node: int) -> Process:
        """A rank of the newest attempt."""
        record = read_record(self.folder / (f"agent-{node}.json" if node else "agent.json"))
        assert record is not None
        return Process.of(record["ranks"][str(rank)])

    def ended(self, agent: int) -> Ended:
        """How an agent ended, in the order in which they were started."""
        process = self.agents[agent]
        out, err = process.communicate(timeout=90)
        return Ended(process.returncode, out, err)

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.kill()
            if agent.stdout is not None and not agent.stdout.closed:
                agent.communicate()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def make(*overrides: str, **shape: Any) -> Nodes:
            made = Nodes(tmp_path / "run", *overrides, **shape)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run on two ranks of one node, undisturbed."""
    return curve(ROWS, tmp_path_factory.mktemp("whole") / "run", "ddp-2", *SLOW)


def test_two_nodes_learn_what_one_does_and_go_on_when_a_rank_of_either_is_killed(
    nodes: Any, whole: list[float]
) -> None:
    run = nodes().start(0, 1).after(5)
    os.kill(run.rank(1, node=1).pid, signal.SIGKILL)
    run.after(20, attempts=2)
    os.kill(run.rank(0, node=0).pid, signal.SIGKILL)
    first, second = run.ended(0), run.ended(1)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert losses(run.folder) == whole
    assert [event["rank"] for event in events(run.folder, "restart")] == [1, 0]
    assert "rank 1 was killed by SIGKILL" in first.err
    assert second.out == "", "rank 0 is shown by node 0"
    assert audit(Run(run.folder)).problems == []
    assert sorted(path.name for path in (run.folder / "logs/attempt-0").glob("rank-*")) == ["rank-0.log", "rank-1.log"]


def test_a_lost_node_is_waited_for_and_the_run_goes_on_with_it(nodes: Any, whole: list[float]) -> None:
    run = nodes().start(0, 1).after(5)
    rank = run.rank(1, node=1)
    run.agents[1].kill()
    assert run.ended(1).code == -signal.SIGKILL
    time.sleep(0.5)
    assert not rank.alive, "no rank outlives its agent"
    run.start(1)
    first, again = run.ended(0), run.ended(2)
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert losses(run.folder) == whole
    (fault,) = events(run.folder, "fault")
    assert "node 1" in fault["error"] and "is lost" in fault["error"]


def test_a_run_goes_on_with_fewer_nodes_and_with_all_when_they_are_back(nodes: Any, whole: list[float]) -> None:
    run = nodes("train.steps=200", "schedule={name: constant}", min_nodes=1, rejoin_seconds=0.5).start(0, 1).after(5)
    run.agents[1].kill()
    run.after(20, attempts=2)
    run.start(1)
    first, again = run.ended(0), run.ended(2)
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert [event["world_size"] for event in events(run.folder, "start")] == [2, 1, 2]
    assert [(event["before"], event["ranks"]) for event in events(run.folder, "resize")] == [(2, 1), (1, 2)]
    assert audit(Run(run.folder)).problems == []
    steady = curve(ROWS, run.folder.parent / "steady", "single-1", *SLOW, "schedule={name: constant}")
    assert difference(losses(run.folder)[:STEPS], steady) < 1e-5


def test_a_new_agent_of_node_0_takes_over_and_the_others_come_to_it(nodes: Any, whole: list[float]) -> None:
    run = nodes().start(0, 1).after(9)
    run.agents[0].kill()
    run.ended(0)
    run.start(0)
    second, first = run.ended(1), run.ended(2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert losses(run.folder) == whole


@pytest.mark.parametrize("node", [0, 1])
def test_a_stop_signal_to_any_node_saves_and_stops_all(nodes: Any, node: int, whole: list[float]) -> None:
    run = nodes().start(0, 1).after(10)
    run.agents[node].terminate()
    first, second = run.ended(0), run.ended(1)
    assert (first.code, second.code) == (75, 75), first.err + second.err
    assert "unitrain resume" in first.err
    run.start(0, 1)
    assert (run.ended(2).code, run.ended(3).code) == (0, 0)
    assert losses(run.folder) == whole
    assert [event["step"] for event in events(run.folder, "start")][1] == events(run.folder, "preempt")[0]["step"]


def test_a_frozen_rank_of_another_node_is_found_and_named(nodes: Any, whole: list[float]) -> None:
    run = nodes("recovery.hang_seconds=2").start(0, 1).after(5)
    os.kill(run.rank(1, node=1).pid, signal.SIGSTOP)
    assert (run.ended(0).code, run.ended(1).code) == (0, 0)
    (hang,) = events(run.folder, "hang")
    assert (hang["rank"], hang["stopped"]) == (1, True)
    assert sorted(hang["stacks"]) == ["logs/attempt-0/stacks-rank-0.txt", "logs/attempt-0/stacks-rank-1.txt"]
    assert losses(run.folder) == whole


def test_an_error_of_a_rank_elsewhere_is_the_last_thing_that_node_0_prints(nodes: Any) -> None:
    run = nodes(trainer("Failing"), "recovery.restarts=0").start(0, 1)
    first, second = run.ended(0), run.ended(1)
    assert first.code == second.code == 70
    fault = events(run.folder, "fault")[-1]
    assert first.err.strip().endswith(fault["error"])
    assert (run.folder / fault["capsule"]).is_dir()


def wait_for(port: int) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        assert time.monotonic() < deadline, "the agent of node 0 does not listen"
        time.sleep(0.01)


def test_nodes_that_never_come_end_the_run_in_time(nodes: Any) -> None:
    run = nodes(join_seconds=1).start(0)
    ended = run.ended(0)
    assert ended.code == 70
    assert ended.last_line == "node 1 of 2 did not come within 1 s"
    run = Nodes(run.folder.parent / "other", join_seconds=1).start(1)
    ended = run.ended(0)
    assert ended.code == 78
    assert "not in a folder that all nodes share" in ended.last_line


def test_strangers_and_agents_of_other_runs_are_kept_out(nodes: Any, tmp_path: Path, whole: list[float]) -> None:
    run = nodes().start(0)
    wait_for(run.port)
    assert (run.folder / KEY).stat().st_mode & 0o077 == 0, "nobody else may read the key"
    words = [
        b"\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x00" * 4096,
        b"0" * 32 + b"\n" + b"0" * 64 + b'{"node": 1}\n',
        b"a" * 100_000,
    ]
    for word in words:
        with socket.create_connection(("127.0.0.1", run.port), timeout=10) as stranger:
            challenge = stranger.recv(100)
            assert len(challenge) == 33
            with contextlib.suppress(OSError):  # it may have hung up already
                stranger.sendall(word)
                stranger.shutdown(socket.SHUT_WR)
                assert not stranger.recv(100), "no answer to a stranger"
    other = tmp_path / "other" / run.folder.name
    other.mkdir(parents=True)
    other.joinpath("job.json").write_text(run.folder.joinpath("job.json").read_text())
    other.joinpath(KEY).write_text("0" * 64)
    values = json.loads(other.joinpath("job.json").read_text())
    values["options"]["join_seconds"] = 1
    other.joinpath("job.json").write_text(json.dumps(values))
    run.start(1, run_dir=other)
    assert run.ended(1).code == 70, "it does not know the key"
    other.joinpath(KEY).write_bytes((run.folder / KEY).read_bytes())
    other.joinpath("job.json").write_text(json.dumps({**values, "nproc": 2}))
    run.start(1, run_dir=other)
    refused = run.ended(2)
    assert refused.code == 78
    assert "node 1 has nproc 2, node 0 has 1" in refused.err
    run.start(1)
    assert (run.ended(0).code, run.ended(3).code) == (0, 0)
    assert losses(run.folder) == whole


def test_snapshots_in_memory_survive_the_loss_of_a_rank_and_of_a_node(nodes: Any, whole: list[float]) -> None:
    every = 3
    pace = trainer("Slower")  # a rank keeps its two newest snapshots: a copy has to come before they are written over
    kept = "checkpoint.every=50", f"checkpoint.memory_every={every}"
    run = nodes(pace, *kept, rejoin_seconds=20).start(0, 1).after(10)
    os.kill(run.rank(1, node=1).pid, signal.SIGKILL)
    run.after(20, attempts=2)
    run.agents[1].kill()
    run.start(1).after(30, attempts=3)
    os.kill(run.rank(0, node=0).pid, signal.SIGKILL)
    first, again = run.ended(0), run.ended(2)
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert losses(run.folder) == whole
    begins = [event["step"] for event in events(run.folder, "start")[1:]]
    # A copy takes a moment to come to the other node; then it holds the snapshot before.
    assert all(at - 2 * every <= begin <= at + every for at, begin in zip((10, 20, 30), begins, strict=True)), begins
    assert events(run.folder, "snapshot_damaged") == []
    assert audit(Run(run.folder)).problems == []
