"""A run that is killed, moved or damaged goes on as if nothing had happened, or says why it does not.

Exact means equal bits: on one strategy and number of ranks, after any number of kills. From one strategy or number of
ranks to another, curves are tight.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unitrain.agent.records import AGENT, Process, read_record
from unitrain.checkpoint import CheckpointReader
from unitrain.cursor import sample_ids
from unitrain.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch

from .runs import (
    COMMAND,
    ROWS,
    checkpoints,
    copied,
    curve,
    damage,
    difference,
    events,
    fit,
    fit_together,
    launch,
    losses,
    metrics,
    resume,
    samples,
    trainer,
    unitrain,
)
from .trainers import NUM_ROWS

TIGHT = 1e-5
STEPS = 40
LONG = [
    *(trainer("Slow"), f"train.steps={STEPS}", "train.eval_every=0", "checkpoint.every=7"),
    "recovery.restarts=0",  # a kill is to end the run: test_recovery has those that go on by themselves
]
SHAPES = ["ddp-2", "ddp-3", "fsdp2-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, list[float]]:
    """The curve of a run that nobody disturbed, by shape."""
    return {shape: curve(ROWS, folder / f"whole-{shape}", shape, *LONG) for shape in SHAPES}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_killed_run_resumes_exactly(
    folder: Path, whole: dict[str, list[float]], shape: str, full_drills: bool
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"kills of {shape} are drawn with seed {seed}")
    chance = random.Random(seed)
    for attempt in range(34 if full_drills else 1):
        run = folder / f"killed-{shape}-{attempt}"
        kills = [chance.randrange(1, STEPS) for _ in range(chance.choice([1, 1, 2]))]
        print(f"killed after steps {kills}")
        for number, step in enumerate(sorted(kills)):
            (launched if number == 0 else resumed)(run, shape).killed_after(step, everything=chance.random() < 0.5)
        resume(run, shape).succeeded()
        assert losses(run) == whole[shape]
        assert samples(run) == [sample_ids(0, step, 10, NUM_ROWS["train"]).tolist() for step in range(STEPS)]
        assert CheckpointReader(checkpoints(run)[-1]).step == STEPS
        shutil.rmtree(run)


class Going:
    """A command that is about to be killed."""

    def __init__(self, run: Path, *arguments: str | Path) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [COMMAND, *arguments],
            cwd=run.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def killed_after(self, step: int, *, everything: bool) -> None:
        """SIGKILL as soon as a step is logged: to the launcher, the agent and all ranks, or to the ranks alone.

        Steps that were logged before do not count: a run that resumes goes through them again.
        """
        deadline = time.monotonic() + 60
        while self._step() < step:
            assert self.process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, f"it never reached step {step}"
            time.sleep(0.002)
        agent = read_record(self.run / AGENT)
        assert agent is not None, "ranks have written, so the agent has too"
        processes = [Process(**agent["process"]), *map(Process.of, agent["ranks"].values())]
        if everything:
            self.process.kill()
            os.kill(processes[0].pid, signal.SIGKILL)
        for process in processes[1:]:
            if process.alive:
                os.kill(process.pid, signal.SIGKILL)
        assert self.process.wait(timeout=30) == (-signal.SIGKILL if everything else 70)
        while any(process.alive for process in processes):
            assert time.monotonic() < deadline, "something outlived SIGKILL"
            time.sleep(0.01)

    def _step(self) -> int:
        started = [event["time"] for event in events(self.run, "start")]
        if len(started) < len(events(self.run, "launch")):
            return 0
        records = metrics(self.run)
        return int(records[-1]["step"]) if records else 0


def launched(run: Path, shape: str) -> Going:
    """A run that has just been launched."""
    strategy, _, ranks = shape.rpartition("-")
    recipe = run.with_suffix(".yaml")
    recipe.write_text(ROWS)
    return Going(run, "launch", recipe, "--strategy", strategy, "--nproc", ranks, "--run-dir", run, *LONG)


def resumed(run: Path, shape: str) -> Going:
    """A run that has just been resumed."""
    return Going(run, "resume", run)


ORIGINS = ["single-1", "ddp-2", "ddp-3", "fsdp2-2", "fsdp2-3"]
SEVERAL = trainer("Several")


@pytest.fixture(scope="module")
def origins(folder: Path) -> dict[str, Path]:
    """A run of 20 steps that has a checkpoint after ten, by the shape that wrote it."""
    runs = {shape: folder / f"from-{shape}" for shape in ORIGINS}
    for shape, run in runs.items():
        curve(ROWS, run, shape, SEVERAL)
    return runs


@pytest.mark.parametrize("shape", ORIGINS)
def test_a_run_resumes_on_any_strategy_and_number_of_ranks(
    folder: Path, origins: dict[str, Path], shape: str, record_property: Callable[[str, object], None]
) -> None:
    moved = {name: copied(run, folder / f"{name}-to-{shape}", up_to=10) for name, run in origins.items()}
    strategy, _, ranks = shape.rpartition("-")
    if ranks == "1":
        for run in moved.values():
            fit(ROWS, run, SEVERAL, strategy=strategy)
    else:
        fit_together(shape, list(moved.values()))
    for name, run in moved.items():
        reached = max(difference(ours, theirs) for ours, theirs in zip(curves(run), curves(origins[name]), strict=True))
        print(f"{name} to {shape}: {reached:.1e}")
        record_property(f"{name} to {shape}", reached)
        assert reached < TIGHT
        assert losses(run)[:10] == losses(origins[name])[:10]
        assert (losses(run) == losses(origins[name])) or name != shape
        producer = CheckpointReader(checkpoints(run)[-1]).producer
        assert (producer["strategy"], str(producer["world_size"])) == (strategy, ranks)


def curves(run: Path) -> list[list[float]]:
    """The losses of all models of a finished run of `trainers.Several`, and its evaluations."""
    extra = CheckpointReader(checkpoints(run)[-1]).state["extra"]
    return [losses(run), extra["sgd"], extra["own"], [record["loss"] for record in metrics(run, "eval")]]


FEW = ["train.steps=12", "checkpoint.every=4"]


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A run of 12 steps with checkpoints after 4, 8 and 12."""
    curve(ROWS, folder / "finished", "single-1", *FEW)
    return folder / "finished"


@pytest.mark.parametrize("file", ["part-0-0.safetensors", "state.json", "part-0.json", "MANIFEST.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    finished: Path, tmp_path: Path, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    newest = checkpoints(run)[-1]
    damage(newest / file)
    kept = (newest / file).read_bytes()
    fit(ROWS, run, *FEW)
    out = capfd.readouterr().out
    assert f"warning: the checkpoint {newest} is damaged and was passed over: {newest}/{file}" in out
    assert "resumed at step 8 " in out
    assert [event["folder"] for event in events(run, "checkpoint_damaged")] == [str(newest)]
    assert losses(run) == losses(finished)
    assert (newest / file).read_bytes() == kept, "a damaged checkpoint stays for inspection"
    fit(ROWS, run, *FEW)
    assert "resumed at step 12 " in capfd.readouterr().out


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for folder in checkpoints(run):
        damage(folder / "part-0-0.safetensors")
    before = losses(run)
    with pytest.raises(CheckpointDamaged, match=r"is damaged.*move them away to start from the beginning"):
        fit(ROWS, run, *FEW)
    assert losses(run) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["train.seed=3"], "train.seed was 0 and is now 3"),
        (["train.global_batch=11"], "train.global_batch was 10 and is now 11"),
        ([trainer("Fewer")], "training data was 'ArraySource:"),
    ],
)
def test_a_run_is_not_resumed_with_other_samples(finished: Path, tmp_path: Path, changes: list[str], told: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(CheckpointMismatch, match="belongs to another run: " + re.escape(told)) as raised:
        fit(ROWS, run, *FEW, *changes)
    assert raised.value.exit_code == 78
    assert losses(run) == losses(finished)


def test_a_refused_change_does_not_stay_in_the_run(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    refused = resume(run, "single-1", "train.seed=3")
    assert refused.code == 78
    assert "train.seed was 0 and is now 3" in refused.last_line
    assert "Traceback" not in refused.err
    resume(run, "single-1", "train.steps=14").succeeded()
    assert len(losses(run)) == 14


def test_a_run_goes_on_longer_and_with_another_rate(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    fit(ROWS, run, "train.steps=16", "optimizer.lr=1e-3", "schedule.name=constant")
    assert losses(run)[:12] == losses(finished)
    assert [record["lr"] for record in metrics(run)[12:]] == [1e-3] * 4


def test_a_finished_run_says_so_and_stays_as_it_is(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    ended = resume(run, "single-1").succeeded()
    assert "step 12 of 12 from" in ended.out
    assert "nothing is left to do" in ended.out
    for name in ("metrics.jsonl", "recipe.yaml"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert [path.name for path in checkpoints(run)] == [path.name for path in checkpoints(finished)]


def test_a_run_that_failed_before_its_first_checkpoint_has_each_step_once(tmp_path: Path) -> None:
    failing = trainer("Failing")
    with pytest.raises(RuntimeError, match="this step fails"):
        fit(ROWS, tmp_path / "run", failing)
    assert len(losses(tmp_path / "run")) == 5
    (tmp_path / "run" / "pass").touch()
    fit(ROWS, tmp_path / "run", failing)
    assert losses(tmp_path / "run") == curve(ROWS, tmp_path / "whole", "single-1")
    assert [record["step"] for record in metrics(tmp_path / "run", "eval")] == [10, 20]


def test_dropout_resumes_exactly(tmp_path: Path) -> None:
    recipe = BATCH_NORM.replace("convnet, channels: 8, depth: 1, norm: batch", "mlp, dropout: 0.4")
    overrides = ["train.steps=6", "checkpoint.every=3"]
    whole = curve(recipe, tmp_path / "whole", "single-1", *overrides)
    fit(recipe, copied(tmp_path / "whole", tmp_path / "again", up_to=3), *overrides)
    assert losses(tmp_path / "again") == whole
    assert losses(tmp_path / "again") != curve(recipe, tmp_path / "dry", "single-1", *overrides, "model.dropout=0")


def test_running_statistics_resume_exactly(tmp_path: Path) -> None:
    overrides = ["train.steps=6", "checkpoint.every=3", "train.micro_batch=null"]
    curve(BATCH_NORM, tmp_path / "whole", "ddp-2", *overrides)
    again = copied(tmp_path / "whole", tmp_path / "again", up_to=3)
    resume(again, "ddp-2").succeeded()
    assert losses(again) == losses(tmp_path / "whole")
    evaluations = [[record["loss"] for record in metrics(tmp_path / name, "eval")] for name in ("again", "whole")]
    assert evaluations[0] == evaluations[1]


BATCH_NORM = """\
name: digits
trainer: unitrain.tasks:Classification
model: {name: convnet, channels: 8, depth: 1, norm: batch}
data: {name: digits}
train: {global_batch: 20, log_every: 1, eval_every: 3}
"""

GAN = Path(__file__).parents[2] / "examples" / "gan.yaml"


@pytest.mark.parametrize("shape", ["single-1", "ddp-3", "fsdp2-2"])
def test_several_models_resume_exactly(tmp_path: Path, shape: str) -> None:
    recipe = GAN.read_text().replace("trainer: gan.py", f"trainer: {GAN.with_suffix('.py')}")
    overrides = ["train.steps=8", "train.log_every=1", "checkpoint.every=4", "train.global_batch=32"]
    whole = curve(recipe, tmp_path / "whole", shape, *overrides)
    again = copied(tmp_path / "whole", tmp_path / "again", up_to=4)
    if shape == "single-1":
        fit(recipe, again, *overrides)
    else:
        resume(again, shape).succeeded()
    assert losses(again) == whole
    final = [CheckpointReader(checkpoints(run)[-1]) for run in (again, tmp_path / "whole")]
    assert final[0].roles == ["discriminator", "generator"]
    assert tensors(final[0]) == tensors(final[1])


def tensors(reader: CheckpointReader) -> dict[tuple[str, str, str], bytes]:
    """All bits of a checkpoint."""
    return {
        (role, kind, name): held.read(kind, name, (0,) * len(info.shape), info.shape).tobytes()
        for role in reader.roles
        for held in [reader.role(role)]
        for (kind, name), info in held.tensors.items()
    }


@pytest.mark.parametrize(
    "where", ["memory://{unique}/checkpoints", "file://{tmp_path}/elsewhere", "{tmp_path}/elsewhere"]
)
def test_checkpoints_may_lie_elsewhere(finished: Path, tmp_path: Path, where: str) -> None:
    path = where.format(tmp_path=tmp_path, unique=tmp_path.name)
    for steps in (8, 12):
        fit(ROWS, tmp_path / "run", *FEW, f"train.steps={steps}", "schedule.name=constant", f"checkpoint.path={path}")
    assert len(losses(tmp_path / "run")) == 12
    assert [event["step"] for event in events(tmp_path / "run", "start")] == [0, 8]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_relative_place_of_checkpoints_is_the_same_after_a_resume_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(ROWS)
    (tmp_path / "other").mkdir()
    options = ["--strategy", "single", "checkpoint.path=beside", "train.steps=4"]
    unitrain("launch", "rows.yaml", "--run-dir", "run", *options, cwd=tmp_path).succeeded()
    ended = unitrain("resume", "../run", "train.steps=6", cwd=tmp_path / "other").succeeded()
    assert "resumed at step 4 " in ended.out
    assert len(checkpoints(tmp_path / "run", tmp_path / "beside")) == 2


@pytest.mark.parametrize("small_disk", ["512k"], indirect=True)
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, place = tmp_path / "run", f"checkpoint.path={small_disk}/checkpoints"
    fit(ROWS, run, *FEW, place, "train.steps=4")
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bfree * os.statvfs(small_disk).f_bsize))
    capfd.readouterr()
    with pytest.raises(CheckpointError, match=r"failed, the previous one stays: .*No space left on device"):
        fit(ROWS, run, *FEW, place)
    assert len(losses(run)) == 12, "the training went on"
    assert "warning: the checkpoint of step 8 was not saved: " in capfd.readouterr().out
    assert [event["step"] for event in events(run, "checkpoint_failed")] == [8, 12]
    (small_disk / "ballast").unlink()
    fit(ROWS, run, *FEW, place)
    assert losses(run) == curve(ROWS, tmp_path / "whole", "single-1", *FEW)
    assert [event["step"] for event in events(run, "start")] == [0, 4, 4]


@pytest.mark.parametrize("small_disk", ["512k"], indirect=True)
def test_a_full_disk_at_the_last_save_fails_the_run_with_one_message(small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bfree * os.statvfs(small_disk).f_bsize))
    place = f"checkpoint.path={small_disk}/checkpoints"
    ended = launch(ROWS, tmp_path / "run", "ddp-2", *FEW, place, "recovery.restarts=0")
    assert ended.code == 70
    assert "failed, the previous one stays: " in ended.last_line
    assert "No space left on device" in ended.last_line
    assert "Traceback" not in ended.err
    assert len(losses(tmp_path / "run")) == 12
