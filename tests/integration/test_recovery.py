"""A run goes on by itself when ranks die, hang or raise, and stops in good order when asked to: nothing is lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from unitrain.agent.hang import is_stopped
from unitrain.agent.records import AGENT, Process, read_record
from unitrain.audit import audit
from unitrain.checkpoint import CheckpointReader
from unitrain.checkpoint.lease import LEASE
from unitrain.cursor import sample_ids
from unitrain.recipe import Recipe
from unitrain.recipe_file import recipe_from_text
from unitrain.run import Run
from unitrain.trainer_path import resolve_trainer

from .runs import (
    COMMAND,
    ROWS,
    TRAINERS,
    Ended,
    checkpoints,
    curve,
    events,
    fit,
    launch,
    losses,
    metrics,
    resume,
    samples,
    trainer,
)
from .trainers import NUM_ROWS

STEPS, EVERY = 40, 7
SLOW = [trainer("Slow"), f"train.steps={STEPS}", "train.eval_every=0", f"checkpoint.every={EVERY}"]
# A save that the step waits for: how many steps come again is then known exactly.
EXACT = [*SLOW, "checkpoint.async=false"]
SHAPES = ["ddp-2", "fsdp2-2"]
JAX = TRAINERS.with_name("jax_trainers.py")
# shape -> runs of the full drill, kills of each in every test run
KILLS = {"ddp-2": (9, 3), "fsdp2-2": (9, 3), "zero3-2": (8, 1), "jax-2": (8, 1)}


class Going:
    """A run that is under way, and is about to be disturbed."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self.folder = folder
        self.began = len(events(folder, "start"))
        self.seen: set[Process] = set()
        pipe = subprocess.PIPE
        command = [COMMAND, *arguments]
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=folder.parent, stdout=pipe, stderr=pipe, text=True, env=environ)

    def after(self, step: int, *, attempts: int = 1) -> Going:
        """As soon as a step is logged by that many attempts since the command."""
        deadline = time.monotonic() + 60
        while len(events(self.folder, "start")) < self.began + attempts or self.step < step:
            assert self.process.poll() is None, self.ended()
            assert time.monotonic() < deadline, f"it never reached step {step}"
            time.sleep(0.002)
        return self

    @property
    def step(self) -> int:
        records = metrics(self.folder)
        return int(records[-1]["step"]) if records else 0

    def rank(self, number: int) -> Process:
        """A rank of the newest attempt."""
        record = read_record(self.folder / AGENT)
        assert record is not None
        ranks = {rank: Process.of(pid) for rank, pid in record["ranks"].items()}
        self.seen |= {Process(**record["process"]), *ranks.values()}
        return ranks[str(number)]

    def signal(self, number: int, rank: int | None = None) -> Going:
        """Send a signal to a rank, or to the command."""
        os.kill(self.process.pid if rank is None else self.rank(rank).pid, number)
        return self

    def ended(self) -> Ended:
        """How it ended, and that it took everything with it."""
        with contextlib.suppress(KeyError, AssertionError):
            self.rank(0)
        out, err = self.process.communicate(timeout=120)
        deadline = time.monotonic() + 5
        while any(process.alive for process in self.seen):
            assert time.monotonic() < deadline, "something outlives the run"
            time.sleep(0.01)
        return Ended(self.process.returncode, out, err)


def launched(folder: Path, shape: str, *overrides: str) -> Going:
    strategy, _, ranks = shape.rpartition("-")
    recipe = folder.with_name(f"{folder.name}.yaml")
    recipe.write_text(ROWS)
    how = ["--strategy", strategy, "--nproc", ranks, "--run-dir", folder]
    return Going(folder, "launch", recipe, *how, *overrides, *framework(strategy))


def framework(strategy: str) -> list[str]:
    """The override that has our Trainer in the framework of the strategy."""
    return [f"trainer={JAX}:Slow"] if strategy == "jax" else []


def resumed(folder: Path) -> Going:
    return Going(folder, "resume", folder)


def weights(folder: Path) -> dict[tuple[str, str], bytes]:
    """All bits of the last checkpoint."""
    reader = CheckpointReader(checkpoints(folder)[-1])
    assert reader.step == STEPS
    held = reader.role("model")
    return {
        (kind, name): held.read(kind, name, (0,) * len(info.shape), info.shape).tobytes()
        for (kind, name), info in held.tensors.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovery")


class Undisturbed(dict[str, Path]):
    """Runs that nobody disturbed, by shape."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, shape: str) -> Path:
        run = self.folder / f"whole-{shape}"
        launch(ROWS, run, shape, *SLOW, *framework(shape.partition("-")[0])).succeeded()
        self[shape] = run
        return run


@pytest.fixture(scope="module")
def whole(folder: Path) -> Undisturbed:
    return Undisturbed(folder)


def assert_same(run: Path, undisturbed: Path) -> None:
    """Every step once, on its own samples, with the same bits in the end."""
    assert losses(run) == losses(undisturbed)
    assert samples(run) == [sample_ids(0, step, 10, NUM_ROWS["train"]).tolist() for step in range(STEPS)]
    assert weights(run) == weights(undisturbed)


def redone(run: Path) -> list[int]:
    """How many steps each restart went back."""
    counts = []
    for path in sorted(run.glob("samples-0.jsonl")):
        steps = [int(line.partition(":")[2].partition(",")[0]) for line in path.read_text().splitlines()]
        counts += [before + 1 - after for before, after in itertools.pairwise(steps) if after <= before]
    return counts


def chances() -> random.Random:
    seed = random.SystemRandom().randrange(10**6)
    print(f"drawn with seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("shape", KILLS)
def test_a_run_whose_ranks_are_killed_goes_on_by_itself(
    folder: Path, whole: dict[str, Path], shape: str, full_drills: bool
) -> None:
    chance, (runs, few) = chances(), KILLS[shape]
    for number in range(runs if full_drills else 1):
        run = folder / f"killed-{shape}-{number}"
        kills = [(0, 3), (chance.randrange(2), 30), (1, 15)][-few:]
        kills.sort(key=lambda kill: kill[1])
        if full_drills:
            kills = [(chance.randrange(2), step + chance.randrange(8)) for step in (1, 14, 28)]
        print(f"(rank, step) killed: {kills}")
        going = launched(run, shape, *EXACT)
        for attempts, (rank, step) in enumerate(kills, 1):
            going.after(step, attempts=attempts).signal(signal.SIGKILL, rank)
        ended = going.ended().succeeded()
        assert_same(run, whole[shape])
        assert [event["rank"] for event in events(run, "restart")] == [rank for rank, _ in kills]
        assert len(list(run.glob("failures/*/capsule.json"))) == len(kills)
        assert audit(Run(run)).problems == []
        assert max(redone(run)) <= EVERY
        assert ended.err.count("was killed by SIGKILL") == len(kills), "each restart is one line"
        assert f"restart {len(kills)}, from step {events(run, 'restart')[-1]['step']}" in ended.err
        print(f"seconds to the new ranks: {[event['seconds'] for event in events(run, 'restart')]}")
        shutil.rmtree(run)


def test_a_stopped_rank_is_named_as_hung_and_replaced(folder: Path, whole: dict[str, Path]) -> None:
    run = folder / "stopped"
    going = launched(run, "ddp-2", *EXACT, "recovery.hang_seconds=2").after(10)
    zombie = going.rank(1)
    os.kill(zombie.pid, signal.SIGSTOP)
    going.after(20, attempts=2)
    assert not zombie.alive, "SIGKILL ends a stopped process too"
    assert not is_stopped(zombie.pid)
    ended = going.ended().succeeded()
    assert_same(run, whole["ddp-2"])
    (hang,) = events(run, "hang")
    assert (hang["rank"], hang["stopped"], hang["no_stacks"]) == (1, True, [])
    assert 1.9 < hang["seconds"] < 5
    for path in hang["stacks"]:
        assert "trainers.py" in (run / path).read_text() or "trainer.py" in (run / path).read_text()
    assert "rank 1 hangs: it made no progress in step" in ended.err
    assert "stopped by a signal" in ended.err
    assert sorted(path.name for path in run.glob("logs/*/stacks-*")) == ["stacks-rank-0.txt", "stacks-rank-1.txt"]
    capsule = json.loads((run / "failures" / "0001" / "capsule.json").read_text())
    assert (capsule["how"], capsule["rank"], capsule["step"]) == ("hang", 1, hang["step"] + 1)
    assert capsule["sample_ids"] == sample_ids(0, hang["step"], 10, NUM_ROWS["train"]).tolist()
    assert capsule["stacks"] == hang["stacks"]


def test_an_exception_that_comes_once_is_survived_and_named(folder: Path, whole: dict[str, Path]) -> None:
    run = folder / "once"
    ended = launch(ROWS, run, "ddp-2", *SLOW, trainer("FailsOnce")).succeeded()
    assert_same(run, whole["ddp-2"])
    (restart,) = events(run, "restart")
    assert (restart["rank"], restart["error"], restart["attempt"]) == (1, "RuntimeError: this step fails once", 1)
    assert "rank 1 raised RuntimeError" in ended.err
    assert "Traceback" not in ended.err, "it is in the rank's log"
    assert "this step fails once" in (run / "logs" / "attempt-0" / "rank-1.log").read_text()
    assert [event["attempt"] for event in events(run, "fault")] == [0]


def test_an_exception_that_comes_again_and_again_ends_the_run_as_a_crash_loop(folder: Path) -> None:
    run = folder / "loop"
    ended = launch(ROWS, run, "ddp-2", trainer("Failing"), *EXACT[2:3], "checkpoint.every=2", EXACT[-1])
    assert ended.code == 93
    assert ended.last_line == "RuntimeError: this step fails"
    assert "crash loop: 3 attempts in a row failed without a newer checkpoint" in ended.err
    told = re.findall(r"^  (\d) x rank [01]: RuntimeError: this step fails$", ended.err, re.MULTILINE)
    assert sum(map(int, told)) == 3
    assert [event["step"] for event in events(run, "restart")] == [4, 4, 4], "the first attempt had left a checkpoint"
    assert events(run, "stop")[-1]["exit_code"] == 93


def test_a_mistake_in_the_first_step_is_told_at_once(folder: Path) -> None:
    run = folder / "mistake"
    ended = launch(ROWS, run, "ddp-2", trainer("NeverSteps"))
    assert (ended.code, ended.last_line) == (70, "TypeError: step takes no batch")
    assert events(run, "restart") == []


def test_a_run_that_is_stopped_by_any_signal_loses_no_step(
    folder: Path, whole: dict[str, Path], full_drills: bool
) -> None:
    chance, hits = chances(), 0
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]
    most = 200 if full_drills else 3
    for number in range(most):
        if hits >= most:
            break
        shape = SHAPES[number % 2]
        run = folder / f"signalled-{number}"
        going = launched(run, shape, *SLOW)
        for place, caught in enumerate(numbers):
            going.after(1 + 8 * place + chance.randrange(6))
            time.sleep(chance.random() * 0.05)
            ended = going.signal(caught, rank=1 if caught == signal.SIGUSR2 else None).ended()
            if ended.code == 0 and len(losses(run)) == STEPS:
                break  # the machine was slow, and the signal came when all was done
            hits += 1
            assert ended.code == 75, f"{caught!r}: {ended}"
            assert f"unitrain resume {run.name}" in ended.err
            stopped = events(run, "preempt")[-1]["step"]
            assert CheckpointReader(checkpoints(run)[-1]).step == stopped == len(losses(run))
            going = resumed(run)
        else:
            assert f"resumed at step {stopped} " in going.ended().succeeded().out
        assert_same(run, whole[shape])
        assert redone(run) == [], "no step came again"
        shutil.rmtree(run)
    assert hits >= most, "too many signals came when all was done"
    print(f"{hits} signals")


def test_a_signal_to_every_process_of_a_job_at_once_saves_too(folder: Path) -> None:
    run = folder / "everybody"
    going = launched(run, "ddp-2", *SLOW, "train.steps=4000").after(9)
    ranks = [going.rank(number).pid for number in range(2)]
    warm, agent = parent_of(ranks[0]), parent_of(parent_of(ranks[0]))
    for pid in (warm, *ranks, agent, going.process.pid):  # as schedulers do
        os.kill(pid, signal.SIGTERM)
    ended = going.ended()
    assert ended.code == 75, ended
    assert CheckpointReader(checkpoints(run)[-1]).step == events(run, "preempt")[-1]["step"] == len(losses(run))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_cancelling_a_run_saves_it(folder: Path) -> None:
    run = folder / "cancelled"
    going = launched(run, "ddp-2", *SLOW, "train.steps=4000").after(9)
    cancelling = Going(run, "cancel", run)
    assert going.ended().code == 75
    ended = cancelling.ended().succeeded()
    assert "preempted; go on with `unitrain resume" in ended.out
    assert CheckpointReader(checkpoints(run)[-1]).step == len(losses(run)) < 4000


@pytest.fixture
def ranks_of_torchrun(tmp_path: Path) -> Iterator[Path]:
    """A run's folder, by whose name its workers are found."""
    yield tmp_path / "run"
    assert workers(tmp_path / "run") == {}, "a worker outlives the run"


def workers(run: Path) -> dict[int, int]:
    """rank -> pid of the workers of a run that no agent of ours started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"unitrain.worker" in words and str(run).encode() in words and b"torch.distributed.run" not in words:
                environ = dict(line.partition(b"=")[::2] for line in (path / "environ").read_bytes().split(b"\0"))
                found[int(environ[b"RANK"])] = int(path.name)
    return found


def test_under_torchrun_a_signal_to_the_launcher_or_to_one_rank_does_the_same(
    folder: Path, whole: dict[str, Path], ranks_of_torchrun: Path
) -> None:
    run = ranks_of_torchrun
    going = launched(run, "ddp-2", *SLOW, "launcher={name: torchrun, nproc: 2}").after(5)
    os.kill(workers(run)[1], signal.SIGTERM)
    ended = going.ended()
    assert ended.code == 75, ended
    going = resumed(run).after(20)
    assert going.signal(signal.SIGUSR1).ended().code == 75
    resume(run, "ddp-2").succeeded()
    assert_same(run, whole["ddp-2"])
    assert redone(run) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_run_without_any_agent_saves_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    run, few = tmp_path / "run", [trainer("Signalled"), "train.steps=12", "checkpoint.every=4"]
    run.mkdir()
    (run / "signal").write_text(str(int(number)))
    result = fit(ROWS, run, *few)
    assert (result.exit_code, result.step) == (75, 6)
    assert f"stopped by {number.name} at step 6, saved; to go on: unitrain resume {run}" in capfd.readouterr().out
    assert [(event["event"], event["step"]) for event in events(run)][-2:] == [("preempt", 6), ("stop", 6)]
    assert fit(ROWS, run, *few).exit_code == 0
    assert losses(run) == curve(ROWS, tmp_path / "whole", "single-1", *few)


def test_a_run_that_saves_nothing_ends_as_a_shell_counts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "signal").write_text(str(int(signal.SIGTERM)))
    result = fit(ROWS, run, trainer("Signalled"), "train.steps=12", "checkpoint.every=0")
    assert (result.exit_code, result.step) == (143, 6)
    assert checkpoints(run) == []


def test_leaving_the_steps_early_closes_the_run_in_good_order(tmp_path: Path) -> None:
    recipe = recipe_from_text(ROWS, overrides=["strategy={name: single}"])
    for _ in resolve_trainer(recipe.trainer)(recipe, run_dir=tmp_path / "run").steps():
        break
    assert [(event["event"], event["step"]) for event in events(tmp_path / "run")] == [("start", 0), ("stop", 1)]


def test_a_worker_that_wakes_up_after_it_was_replaced_publishes_nothing(
    folder: Path, request: pytest.FixtureRequest
) -> None:
    run = folder / "zombie"
    Run.create(run, recipe=_recipe())
    command = [COMMAND.with_name("python"), "-m", "unitrain.worker", run]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    zombie = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
    request.addfinalizer(zombie.communicate)
    request.addfinalizer(zombie.kill)
    deadline = time.monotonic() + 60
    while len(metrics(run)) < 10:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    zombie.send_signal(signal.SIGSTOP)
    (run / "checkpoints" / LEASE).unlink()  # as if it were on another machine, from which nothing comes any more
    assert subprocess.run(command, capture_output=True, check=False, env=environ).returncode == 0
    left = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    zombie.send_signal(signal.SIGCONT)
    assert zombie.stderr is not None
    err = zombie.stderr.read()
    assert zombie.wait(timeout=60) == 70
    assert "was replaced by attempt" in err
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == left


def _recipe() -> Recipe:
    return recipe_from_text(ROWS, overrides=["strategy={name: single}", *SLOW])
