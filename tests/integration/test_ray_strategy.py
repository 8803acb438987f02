"""Ranks in Ray actors: the same losses as ranks of our agent, whatever is killed meanwhile."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from unitrain.errors import ExitCode

from .ray_trainers import DRY, KILLED, STEPS
from .runs import COMMAND, Ended, launch, resume, run, unitrain

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'unitrain[ray]'"
)

TRAINERS = Path(__file__).with_name("ray_trainers.py")
RECIPE = f"""\
name: rows
trainer: {TRAINERS}:Rows
optimizer: {{lr: 1e-2, weight_decay: 0.1, clip: 1.0}}
train: {{steps: {STEPS}, global_batch: 10, micro_batch: 2, log_every: 1, eval_every: 10}}
checkpoint: {{every: 10}}
"""
PAIR = (f"trainer={TRAINERS}:Pair", "train.eval_every=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ray")
    (found / "recipe.yaml").write_text(RECIPE)
    return found


@pytest.fixture(scope="module")
def local(folder: Path) -> Path:
    """The same two ranks of ddp, started by our agent."""
    launch(RECIPE, folder / "ddp", "ddp-2").succeeded()
    return folder / "ddp"


@pytest.fixture(scope="module")
def faults(folder: Path) -> dict[str, Any]:
    """What became of runs of one script, in a Ray of its own; its Trainers are classes of __main__."""
    return script("faults", folder)


@pytest.fixture(scope="module")
def nodes(folder: Path) -> dict[str, Any]:
    return script("nodes", folder)


def script(part: str, folder: Path) -> dict[str, Any]:
    run([sys.executable, TRAINERS, part, folder], cwd=folder).succeeded()
    found: dict[str, Any] = json.loads((folder / f"{part}.json").read_text())
    return found


def lines(folder: Path) -> list[tuple[Any, ...]]:
    """What of the metrics must not change by a bit."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], line["loss"], line.get("grad_norm")) for line in read]


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in read if line["event"] == name]


def test_actors_learn_bit_by_bit_what_ranks_of_our_agent_learn(
    folder: Path, local: Path, faults: dict[str, Any]
) -> None:
    assert len(lines(local)) == STEPS + 3
    assert lines(folder / "peace") == lines(local)
    assert events(folder / "peace", "start")[0]["world_size"] == 2


def test_actors_that_are_killed_or_stopped_are_replaced_and_no_bit_changes(
    folder: Path, local: Path, faults: dict[str, Any]
) -> None:
    assert lines(folder / "faults") == lines(local)
    killed, stopped = events(folder / "faults", "actors_replaced")
    assert killed["lost"] == stopped["lost"] == "actor[1]"
    assert "died" in killed["error"]
    assert "is stopped" in stopped["error"]
    assert all(0 < found["repeated"] <= 8 for found in (killed, stopped)), "a copy of the state every 6 updates"
    assert len({*killed["pids"], *stopped["pids"], killed["pid"]}) == 5, "every group is of new processes"
    assert len(events(folder / "faults", "start")) == 1, "one driver from beginning to end"


def test_models_that_are_in_each_others_losses_learn_what_they_learn_locally(
    folder: Path, faults: dict[str, Any]
) -> None:
    launch(RECIPE, folder / "pair-ddp", "ddp-2", *PAIR).succeeded()
    assert lines(folder / "pair") == lines(folder / "pair-ddp")
    assert len(events(folder / "pair", "actors_replaced")) == 1


def test_shards_of_fsdp2_survive_a_kill_too(folder: Path, faults: dict[str, Any]) -> None:
    launch(RECIPE, folder / "fsdp2-local", "fsdp2-2").succeeded()
    assert lines(folder / "fsdp2") == lines(folder / "fsdp2-local")
    assert len(events(folder / "fsdp2", "actors_replaced")) == 1


def test_a_mistake_in_the_loss_comes_through_as_itself(faults: dict[str, Any], folder: Path) -> None:
    message, note = faults["mistake"]
    assert message == "the second rank's loss is wrong"
    assert "raised in actor[1]" in note
    assert "ray_trainers.py" in note
    assert events(folder / "mistake", "actors_replaced") == []


def test_more_actors_than_the_cluster_holds_are_one_clear_message(faults: dict[str, Any]) -> None:
    kind, message = faults["crowd"]
    assert kind == "NoRoom"
    assert "3 actors" in message
    assert "it has 2 CPU" in message


def test_losses_at_one_place_again_and_again_end_the_run(faults: dict[str, Any]) -> None:
    kind, message = faults["doomed"]
    assert kind == "RankFailed"
    assert "in a row were lost at the same place: actor[1] (pid " in message


def test_a_lost_node_is_made_good_by_a_spare_one_and_then_by_fewer_actors(folder: Path, nodes: dict[str, Any]) -> None:
    launch(RECIPE, folder / "dry", "ddp-2", DRY).succeeded()
    spare, fewer = events(folder / "nodes", "actors_replaced")
    assert (spare["actors"], fewer["actors"], nodes["left"]) == (2, 1, 0)
    found, wanted = lines(folder / "nodes"), lines(folder / "dry")
    exact = [line for line in wanted if line[0] < fewer["step"]]
    assert len(exact) > KILLED
    assert found[: len(exact)] == exact
    for here, there in zip(found, wanted, strict=True):
        assert here[:2] == there[:2]
        assert here[2] == pytest.approx(there[2], rel=1e-5)


def test_a_stop_signal_saves_and_another_strategy_goes_on(folder: Path, local: Path) -> None:
    target, shape = folder / "stopped", ("--strategy", "ray", "--nproc", "2")
    began = subprocess.Popen(
        [COMMAND, "launch", folder / "recipe.yaml", *shape, "--run-dir", target, "model={name: mine, pause: 0.1}"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for_step(target, 5)
    assert unitrain("cancel", target, cwd=folder).code == 0
    assert began.wait(60) == ExitCode.PREEMPTED
    assert actors_of(target) == []
    assert 5 <= lines(target)[-1][0] < STEPS
    resume(target, "ddp-2", "model={name: mine}").succeeded()
    assert lines(target) == lines(local)
    resume(target, "ray-3", f"train.steps={STEPS + 2}").succeeded()
    assert [start["world_size"] for start in events(target, "start")] == [2, 2, 3]
    assert lines(target)[-1][0] == STEPS + 2


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in {folder}")


def actors_of(folder: Path) -> list[int]:
    """Processes of Ray whose working directory is ours, as an actor's is."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                title, where = (process / "cmdline").read_bytes(), os.readlink(process / "cwd")
            except OSError:
                continue
            if title.startswith(b"ray::") and Path(where) == folder.parent:
                found.append(int(process.name))
    return found


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("inner: fsdp", "did you mean 'fsdp2'?"),
        ("inner: ray", "is 'ray' itself"),
        ("inner: horovod", "strategy horovod cannot run in actors"),
        ("actors: 11", "11 actors cannot share a batch of 10 samples"),
        ("actor: 2", "did you mean 'actors'?"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(option: str, complaint: str, tmp_path: Path) -> None:
    ended: Ended = launch(RECIPE, tmp_path / "run", "ray-2", f"strategy={{name: ray, options: {{{option}}}}}")
    assert ended.code == 78
    assert complaint in ended.err
    assert not (tmp_path / "run").exists()
