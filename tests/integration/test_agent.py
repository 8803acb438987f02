"""The agent starts ranks, watches them, and ends them together: with real processes, signals and files."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unitrain.agent.records import Process

PRELUDE = """
import os, signal, socket, subprocess, sys, threading, time
from types import SimpleNamespace
from unitrain.errors import RecipeError
from unitrain.worker import train
from unitrain.world import World

IMPORTED_BY = os.getpid()

def work(rank):
    pass

def main(argv):
    world = World.from_environment()
    def fit():
        work(world)
        return SimpleNamespace(exit_code=0)
    return train(lambda: SimpleNamespace(fit=fit), None)
"""


class Attempt:
    """A run whose ranks execute `work(world)`, under a real agent in a folder of its own."""

    def __init__(self, folder: Path, work: str, *, nproc: int = 2, fork: bool = True, **job: Any) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.run_dir.mkdir(exist_ok=True)
        (folder / "ranks.py").write_text(
            PRELUDE + "\ndef work(world):\n" + textwrap.indent(textwrap.dedent(work), "    ")
        )
        options = {"entry": "ranks:main", **job.pop("options", {})}
        values = {"run_id": "run", "nodes": 1, "nproc": nproc, "preload": ["ranks"], "fork": fork, "options": options}
        (self.run_dir / "job.json").write_text(json.dumps({**values, **job}))
        self.process: subprocess.Popen[str] | None = None

    def start(self, **how: Any) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        how = {"stdout": pipe, "stderr": pipe, "text": True, **how}
        self.process = subprocess.Popen([sys.executable, "-m", "unitrain.agent", "run"], cwd=self.folder, **how)
        return self.process

    def run(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of the agent."""
        out, err = self.start().communicate(timeout=60)
        assert self.process is not None
        return self.process.returncode, out, err

    def log(self, rank: int, attempt: int = 0) -> str:
        return (self.run_dir / "logs" / f"attempt-{attempt}" / f"rank-{rank}.log").read_text()

    def record(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.run_dir / name).read_text())
        return values

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]

    def started(self) -> list[Process]:
        """The ranks' processes, once each has said `up`."""
        wait_until(lambda: all("up" in self.log(rank) for rank in range(2)) and self.record("agent.json")["ranks"])
        return [Process.of(pid) for pid in self.record("agent.json")["ranks"].values()]

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def make(work: str, **shape: Any) -> Attempt:
            made = Attempt(tmp_path, work, **shape)
            stack.callback(made.close)
            return made

        yield make


def wait_until(holds: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(FileNotFoundError, KeyError):
            if holds():
                return
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.01)


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


both_starters = pytest.mark.parametrize("fork", [True, False], ids=["forked", "spawned"])


@both_starters
def test_two_ranks_see_their_place_and_write_logs_of_their_own(attempt: Any, fork: bool) -> None:
    run = attempt(
        """
        import json
        if world.rank == 0:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(world.coordinator_address)
            listener.listen()
        ours = ("RANK", "WORLD", "LOCAL", "GROUP", "MASTER", "TORCHELASTIC", "UNITRAIN_ATTEMPT", "OMP_NUM_THREADS")
        print(json.dumps({name: value for name, value in os.environ.items() if name.startswith(ours)}))
        facts = dict(imported_by=IMPORTED_BY, pid=os.getpid(), parent=os.getppid(), starter=world.starter)
        leads = os.getsid(0) == os.getpid() == os.getpgrp()
        print(json.dumps(facts | dict(leads=leads, input=sys.stdin.read(), argv=sys.argv[1:])))
        """,
        fork=fork,
    )
    code, _, err = run.run()
    assert (code, err) == (0, "")
    facts = []
    for rank in range(2):
        environ, own = map(json.loads, run.log(rank).splitlines())
        assert environ.pop("RANK") == environ.pop("LOCAL_RANK") == str(rank)
        assert own["starter"] == "agent"
        assert own["leads"], "a rank leads a session of its own"
        assert own["input"] == ""
        assert own["argv"] == ["run"]
        facts.append((environ, own))
    assert facts[0][0] == facts[1][0]
    assert facts[0][0] == {
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": facts[0][0]["MASTER_PORT"]},
        **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "run", "UNITRAIN_ATTEMPT": "0"},
        "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
    }
    for _, own in facts:
        assert own["imported_by"] == (own["parent"] if fork else own["pid"])
    assert run.record("agent.json")["ranks"] == {str(rank): own["pid"] for rank, (_, own) in enumerate(facts)}
    assert run.record("exit.json")["exit_code"] == 0
    assert [event["event"] for event in run.events()] == ["stop"]


@both_starters
def test_the_first_failing_rank_has_the_last_word_and_stops_the_others(attempt: Any, fork: bool) -> None:
    run = attempt(
        """
        print("up")
        if world.rank == 1:
            raise ValueError("row 3 is not finite")
        time.sleep(60)
        """,
        fork=fork,
    )
    began = time.monotonic()
    code, out, err = run.run()
    assert code == 70
    assert time.monotonic() - began < 5, "a sleeping rank dies of SIGTERM; nobody waits out the grace"
    assert out == "up\n"
    assert last_line(err) == "ValueError: row 3 is not finite"
    assert "rank 1 raised ValueError" in err
    assert "Traceback" in err
    assert "run/logs/attempt-0/rank-1.log" in err
    assert "unitrain launch run/recipe.yaml" in err, "there is no checkpoint to resume from"
    assert last_line(run.log(1)) == "ValueError: row 3 is not finite", "its own log has it too"
    fault, stop = run.events()
    assert (fault["event"], fault["rank"], fault["error"]) == ("fault", 1, "ValueError: row 3 is not finite")
    assert (stop["event"], stop["exit_code"]) == ("stop", 70)
    assert run.record("exit.json")["error"] == "ValueError: row 3 is not finite"


def test_a_run_with_a_checkpoint_says_how_to_resume(attempt: Any) -> None:
    run = attempt("raise ValueError('late')", nproc=1)
    saved = run.run_dir / "checkpoints" / "s00000010-ab"
    saved.mkdir(parents=True)
    (saved / "MANIFEST.json").write_text("{}")
    _, out, err = run.run()
    assert "unitrain resume run\n" in err
    assert last_line(err) == "ValueError: late"
    assert out == "", "its traceback is said once"


@both_starters
def test_a_killed_rank_is_named_with_its_signal_and_its_peers_errors_are_not(attempt: Any, fork: bool) -> None:
    run = attempt(
        """
        if world.rank == 0:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(world.coordinator_address)
            listener.listen()
            peer, _ = listener.accept()
            if not peer.recv(1):
                raise ConnectionError("connection closed by peer")
        while True:
            try:
                peer = socket.create_connection(world.coordinator_address)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        print("these are my last words")
        os.kill(os.getpid(), signal.SIGTERM)
        """,
        fork=fork,
    )
    code, _, err = run.run()
    assert code == 70
    assert "ConnectionError: connection closed by peer" in run.log(0)
    assert last_line(err).startswith("rank 1 was killed by SIGTERM")
    assert "these are my last words" in err
    assert "ConnectionError" not in err


def test_the_cause_is_named_though_its_consequence_is_told_first(attempt: Any) -> None:
    run = attempt(
        """
        if world.rank == 0:
            class Slow(Exception):
                def __str__(self):
                    time.sleep(0.1)  # its peer speaks meanwhile
                    return "the cause"
            begun = time.monotonic()
            open("begun", "w").close()
            world.tell_agent(kind="ignored")
            time.sleep(0.05)
            account = dict(rank=0, pid=1, host="h", type="E", exit_code=70, log_size=0, monotonic=begun)
            world.tell_agent(kind="error", message="the cause", traceback="E: the cause", **account)
            time.sleep(60)
        while not os.path.exists("begun"):
            time.sleep(0.001)
        raise ConnectionError("the consequence")
        """
    )
    _, _, err = run.run()
    assert last_line(err) == "E: the cause"


def test_a_crash_in_c_code_shows_the_python_line(attempt: Any) -> None:
    run = attempt("import ctypes\nctypes.string_at(0)  # no such address", nproc=2)
    code, _, err = run.run()
    assert code == 70
    assert last_line(err).endswith("was killed by SIGSEGV")
    crashed = run.log(int(err.split()[1]))
    assert "Fatal Python error: Segmentation fault" in crashed
    assert "ranks.py" in crashed


def test_a_user_mistake_is_told_without_a_traceback(attempt: Any) -> None:
    run = attempt("raise RecipeError('train.steps is -1; it must be at least 0')")
    code, _, err = run.run()
    assert code == 78
    assert last_line(err) == "train.steps is -1; it must be at least 0"
    assert "Traceback" not in err + run.log(0)


def test_a_failed_rank_leaves_at_once_though_its_threads_hang(attempt: Any) -> None:
    run = attempt(
        """
        threading.Thread(target=time.sleep, args=(60,)).start()
        raise ValueError("and a thread waits for ever")
        """,
        nproc=1,
    )
    began = time.monotonic()
    code, _, err = run.run()
    assert (code, last_line(err)) == (70, "ValueError: and a thread waits for ever")
    assert time.monotonic() - began < 5


@both_starters
def test_a_rank_that_succeeds_ends_its_threads_and_exit_functions_first(attempt: Any, fork: bool) -> None:
    run = attempt(
        """
        import atexit
        atexit.register(lambda: print("exit function"))
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
        sys.stdout.write("unfinished line, ")
        """,
        nproc=1,
        fork=fork,
    )
    code, out, err = run.run()
    assert (code, out, err) == (0, "unfinished line, thread\nexit function\n", "")


@pytest.mark.parametrize(("code", "ours"), [(75, 75), (78, 78), (3, 70)])
def test_exit_codes_of_ranks_become_those_that_schedulers_know(attempt: Any, code: int, ours: int) -> None:
    run = attempt(f"os._exit({code})")
    found, _, err = run.run()
    assert found == ours
    if code == 75:
        assert "preempted" in err
    else:
        assert last_line(err).endswith(f"ended with exit code {code}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_ranks_and_kills_those_that_stay(attempt: Any, number: int, code: int) -> None:
    run = attempt(
        """
        if world.rank == 1:
            signal.signal(signal.SIGTERM, lambda *caught: print("I stay"))
        print("up")
        while True:
            time.sleep(0.1)
        """,
        options={"grace_seconds": 0.5},
    )
    agent = run.start()
    ranks = run.started()
    began = time.monotonic()
    agent.send_signal(number)
    _, err = agent.communicate(timeout=10)
    assert agent.returncode == code
    assert 0.5 <= time.monotonic() - began < 3
    assert "I stay" in run.log(1)
    assert f"stopped by {signal.Signals(number).name}" in err
    assert "Traceback" not in err
    assert not any(rank.alive for rank in ranks)
    assert run.record("exit.json")["exit_code"] == code


def test_a_second_ctrl_c_waits_for_nobody(attempt: Any) -> None:
    run = attempt("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up')\ntime.sleep(60)")
    agent = run.start()
    ranks = run.started()
    began = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):  # whatever a scheduler repeats changes nothing
        agent.send_signal(number)
        time.sleep(1.1)
    agent.communicate(timeout=10)
    assert agent.returncode == 130
    assert 2.2 < time.monotonic() - began < 8
    assert not any(rank.alive for rank in ranks)


@both_starters
def test_ranks_that_die_are_started_again_from_the_same_warm_process(attempt: Any, fork: bool) -> None:
    run = attempt(
        """
        print("generation", world.generation, IMPORTED_BY, os.environ["UNITRAIN_ATTEMPT"])
        here = f"rank-{world.rank}-{world.generation}"
        open(here, "w").close()
        while world.rank == 1 and not os.path.exists(here.replace("1", "0", 1)):
            time.sleep(0.01)
        if world.rank == 1 and world.generation < 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if world.generation < 2:
            time.sleep(60)
        """,
        fork=fork,
        recovery={"restarts": 3},
    )
    code, out, err = run.run()
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [(line[1], line[3]) for line in lines] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert len({line[2] for line in lines}) == (1 if fork else 3)
    assert err.count("rank 1 was killed by SIGKILL") == 2
    assert "restart 2 in 1 s, from the beginning" in err
    assert [event["event"] for event in run.events()] == ["fault", "restart", "fault", "restart", "stop"]
    first, second = (event for event in run.events() if event["event"] == "restart")
    assert (first["attempt"], first["rank"], second["attempt"]) == (1, 1, 2)
    assert first["seconds"] < 1 <= second["seconds"]


def test_a_warm_process_that_is_killed_is_replaced(attempt: Any) -> None:
    run = attempt(
        """
        print(os.getppid())
        if world.generation == 0 and world.rank == 0:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        """,
        recovery={"restarts": 3},
    )
    code, out, err = run.run()
    assert code == 0, err
    assert len(set(out.split())) == 2


def test_ranks_that_die_again_and_again_are_given_up(attempt: Any) -> None:
    run = attempt("os.kill(os.getpid(), signal.SIGKILL)", nproc=1, recovery={"restarts": 3})
    code, _, err = run.run()
    assert code == 93
    assert "crash loop: 3 attempts in a row failed without a newer checkpoint\n  3 x rank 0: rank 0 was killed" in err
    assert last_line(err).startswith("rank 0 was killed by SIGKILL")
    assert [event["event"] for event in run.events()].count("restart") == 2
    assert run.record("exit.json")["exit_code"] == 93


def test_a_run_that_waits_for_its_next_attempt_can_be_stopped(attempt: Any) -> None:
    run = attempt("os.kill(os.getpid(), signal.SIGKILL)", nproc=1, recovery={"restarts": 9})
    agent = run.start()
    while "in 2 s" not in agent.stderr.readline():
        assert agent.poll() is None
    agent.send_signal(signal.SIGTERM)
    _, err = agent.communicate(timeout=1.5)
    assert agent.returncode == 143
    assert "stopped by SIGTERM" in err


@both_starters
def test_nothing_outlives_an_agent_that_is_killed(attempt: Any, fork: bool) -> None:
    run = attempt("print('up', os.getppid(), flush=True)\ntime.sleep(60)", fork=fork)
    agent = run.start()
    ranks = run.started()
    parents = [Process.of(int(run.log(rank).split()[1])) for rank in range(2)]
    agent.kill()
    agent.communicate()
    wait_until(lambda: not any(process.alive for process in [*ranks, *parents]), seconds=2)


def test_nothing_outlives_a_warm_process_that_is_killed(attempt: Any) -> None:
    run = attempt(
        """
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print("up", os.getppid(), helper.pid)
        time.sleep(60)
        """
    )
    agent = run.start()
    ranks = run.started()
    warm = Process.of(int(run.log(0).split()[1]))
    helpers = [Process.of(int(run.log(rank).split()[2])) for rank in range(2)]
    os.kill(warm.pid, signal.SIGKILL)
    _, err = agent.communicate(timeout=5)
    assert agent.returncode == 70
    assert f"(pid {warm.pid}) was killed by SIGKILL" in last_line(err)
    wait_until(lambda: not any(process.alive for process in [*ranks, *helpers]), seconds=2)


def test_a_process_that_a_rank_leaves_behind_is_ended_with_the_run(attempt: Any) -> None:
    run = attempt("print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)", nproc=1)
    code, out, _ = run.run()
    assert code == 0
    left = int(out)
    wait_until(lambda: not Process.of(left).started, seconds=2)


def test_rank_0_is_heard_as_it_speaks_and_the_others_are_not(attempt: Any) -> None:
    run = attempt(
        """
        print("hello from", world.rank)
        while not os.path.exists("go"):
            time.sleep(0.01)
        sys.stdout.write("no end of line")
        """
    )
    agent = run.start()
    assert agent.stdout is not None
    assert agent.stdout.readline() == "hello from 0\n"
    (run.folder / "go").touch()
    out, _ = agent.communicate(timeout=10)
    assert out == "no end of line\n"
    assert run.log(1) == "hello from 1\nno end of line"


def test_a_terminal_shows_a_panel_in_place_of_announced_lines(attempt: Any) -> None:
    run = attempt(
        """
        for step in range(1, 4):
            line = f"progress of step {step}"
            record = {"step": step, "split": "train", "loss": 1.5, "lr": 0.1, "seconds": 1.0}
            world.tell_agent(kind="progress", record=record, line=line, steps=3)
            print(line)
        print("a line of its own")
        """,
        nproc=1,
    )
    ours, theirs = pty.openpty()
    agent = run.start(stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    assert agent.wait() == 0
    text = seen.decode()
    assert "a line of its own" in text
    assert "progress of step" not in text
    assert "3/3" in text
    assert "progress of step 3" in run.log(0)


def test_a_run_goes_on_when_nobody_reads_its_output(attempt: Any) -> None:
    run = attempt(
        """
        print("up")
        while not os.path.exists("go"):
            time.sleep(0.01)
        print("nobody reads this")
        time.sleep(0.3)
        print("nor this")
        """
    )
    agent = run.start()
    run.started()
    agent.stdout.close()
    agent.stderr.close()
    (run.folder / "go").touch()
    assert agent.wait(timeout=10) == 0
    assert "nor this" in run.log(0)


@pytest.mark.parametrize("detached", [False, True])
def test_a_run_ends_with_whoever_started_it_unless_detached(attempt: Any, detached: bool) -> None:
    run = attempt("print('up')\nwhile not os.path.exists('go'): time.sleep(0.01)")
    flags = ["--detached"] if detached else []
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-m', 'unitrain.agent', 'run', *{flags}])"
    starter = subprocess.Popen([sys.executable, "-c", source], cwd=run.folder)
    ranks = run.started()
    starter.kill()
    starter.wait()
    if detached:
        (run.folder / "go").touch()
    wait_until(lambda: run.record("exit.json"), seconds=10)
    assert run.record("exit.json")["exit_code"] == (0 if detached else 143)
    wait_until(lambda: not any(rank.alive for rank in ranks))


def test_every_attempt_has_logs_of_its_own(attempt: Any) -> None:
    run = attempt("print('attempt', os.environ['UNITRAIN_ATTEMPT'])")
    run.run()
    run.run()
    assert [run.log(1, attempt=number) for number in range(2)] == ["attempt 0\n", "attempt 1\n"]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", "2 threads"),
        ("raise OSError('no device')", "OSError: no device"),
    ],
    ids=["threads", "error"],
)
def test_ranks_are_spawned_where_a_fork_would_not_be_safe(attempt: Any, module: str, reason: str) -> None:
    run = attempt("print(IMPORTED_BY == os.getpid())", preload=["unsafe"])
    (run.folder / "unsafe.py").write_text(module)
    code, out, err = run.run()
    assert (code, out) == (0, "True\n")
    assert reason in err
    assert [event["event"] for event in run.events()] == ["fork_refused", "stop"]


def test_ranks_draw_random_numbers_of_their_own(attempt: Any) -> None:
    run = attempt("import random, numpy\nprint(random.random(), numpy.random.rand())", preload=["numpy", "random"])
    run.run()
    for mine, theirs in zip(run.log(0).split(), run.log(1).split(), strict=True):
        assert mine != theirs


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unitrain.agent", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert done.stderr == f"{tmp_path} has no job.json, so it is not the folder of a run\n"


def test_the_agent_imports_nothing_that_takes_its_time() -> None:
    heavy = ("torch", "numpy", "omegaconf", "rich", "asyncio", "inspect")
    source = (
        f"import sys, unitrain.agent.__main__, unitrain.agent.warm; print([n for n in {heavy} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout in ("[]\n", "['inspect']\n")  # dataclasses needs inspect
