"""RL with a pool of Ray actors: the same numbers as without one, whoever is killed or stopped, and nobody is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

import ray
from ray.exceptions import RayActorError

from unitrain.actors.cluster_ray import private_or_running
from unitrain.actors.group_ray import start_member
from unitrain.errors import UserError
from unitrain.recipe_file import recipe_from_text
from unitrain.rl import GRPO, PPO
from unitrain.rl.rewards import RewardFailed
from unitrain.rl.rollout_worker import PromptsFailed, RolloutFailed, WeightsDiffer
from unitrain.trainer import Trainer

from .runs import COMMAND, checkpoints, events, launch, metrics, unitrain

pytestmark = pytest.mark.timeout(300)

HERE = Path(__file__).parent
# of samples of the same weights, whoever draws them, to the bit
FACTS = ("reward", "kl", "entropy", "length", "loss", "kl_coef", "grad_norm", "clip_fraction", "critic_loss")

LETTERS = """\
name: letters
trainer: unitrain.rl:PPO
model: {name: gpt, layers: 1, width: 32, heads: 2, ffn: 32, max_len: 16}
data: {name: records, path: "unitrain.rl.examples:letters", seq_len: 10}
optimizer: {lr: 3e-3, clip: 1.0}
train: {steps: 5, global_batch: 7, micro_batch: 5, log_every: 1, eval_every: 0}
rl:
  samples_per_prompt: 3
  epochs: 2
  minibatches: 2
  sampling: {max_tokens: 4}
  reward: {function: "unitrain.rl.examples:vowels"}
  kl: {coef: 0.1, target: 0.01, horizon: 50}
checkpoint: {every: 0}
"""
POOL = ("rl.rollout.actors=2", "rl.rollout.prompts_per_call=2")
ALONE = ("rl.rollout.actors=1", "rl.rollout.prompts_per_call=2")  # starting one takes seconds


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray that the runs of this file share."""
    with private_or_running(None, cpus=8, name="tests", object_store_bytes=100 << 20) as found:
        yield found.address


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))  # which actors get too


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the policy's own rank computes."""
    return run(tmp_path_factory.mktemp("local") / "run")


def run(folder: Path, *overrides: str, kind: type[Trainer] = PPO, text: str = LETTERS) -> list[dict[str, Any]]:
    """The metrics of a run on one rank, in this process."""
    kind(recipe_from_text(text, overrides=["strategy={name: single}", *overrides]), run_dir=folder).fit()
    return metrics(folder)


def facts(records: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """What must be alike to the bit."""
    return [[record["step"], *(record.get(name) for name in FACTS)] for record in records]


def slow(folder: Path, seconds: float = 0.4) -> tuple[str, ...]:
    """Overrides: actors that take their time, and say in the folder which processes they are."""
    folder.mkdir()
    return (
        "rl.rollout.engine=rl_engines:Slow",
        f"rl.rollout.options={{folder: {folder}, seconds: {seconds}}}",
    )


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something beside the run; what it raises is raised here."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


def someone(folder: Path, *but: int) -> int:
    """The first process that has begun to generate."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for path in sorted(folder.iterdir()):
            if int(path.name) not in but:
                return int(path.name)
        time.sleep(0.01)
    raise AssertionError("no actor generates")


def actors(address_or_run: str) -> list[str]:
    """Processes of actors, by their titles."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "ray::" in line and address_or_run in line]


# --- the same numbers


def test_a_pool_draws_what_the_rank_itself_would_draw(cluster, local, tmp_path):
    pooled = run(tmp_path / "pooled", *POOL)
    assert facts(pooled) == facts(local)
    for mine, theirs in zip(local, pooled, strict=True):
        assert theirs["gap"] == pytest.approx(mine["gap"], abs=1e-6)  # calls of other sizes round otherwise
        assert theirs["staleness_max"] == 0 and theirs["sync_seconds"] > 0
    # Calls of the same size compute the same to the last bit.
    same = run(tmp_path / "same", "rl.rollout.actors=1", "train.steps=2")
    assert [record["gap"] for record in same] == [record["gap"] for record in local[:2]]


@pytest.mark.parametrize(("shape", "pool"), [("ddp-2", POOL), ("fsdp2-2", ALONE)], ids=["ddp", "fsdp2"])
def test_several_ranks_are_served_by_one_pool_and_shards_are_gathered(shape, pool, cluster, local, tmp_path):
    address = f"rl.rollout.address={cluster}"
    launch(LETTERS, tmp_path / "run", shape, *pool, address, "train.steps=3").succeeded()
    for mine, theirs in zip(local[:3], metrics(tmp_path / "run"), strict=True):
        for name in ("reward", "length", "kl", "entropy", "loss"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-5), (mine["step"], name)
        assert theirs["gap"] < 1e-4


LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["tied", "lora"])
def test_tied_weights_and_adapters_reach_the_actors(lora, cluster, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    model = f"model={json.dumps({'name': 'hf', 'config': LLAMA, 'lora': {'r': 2} if lora else None})}"
    changes = (model, "train.steps=3")
    alone, pooled = run(tmp_path / "alone", *changes), run(tmp_path / "pooled", *changes, "rl.rollout.actors=1")
    assert facts(alone) == facts(pooled)
    assert all(record["gap"] < 1e-4 for record in pooled) and pooled[-1]["kl"] > 0


# --- whoever dies


def test_an_actor_killed_and_one_stopped_change_no_number(cluster, local, tmp_path):
    where = tmp_path / "pids"
    options = (*POOL, *slow(where), "rl.rollout.limit_seconds=4")

    def hurt() -> None:
        killed = someone(where)
        os.kill(killed, signal.SIGKILL)
        stopped = someone(where, killed)
        os.kill(stopped, signal.SIGSTOP)

    with meanwhile(hurt):
        found = run(tmp_path / "run", *options)
    assert facts(found) == facts(local)
    lost = events(tmp_path / "run", "rollout_lost")
    assert len(lost) == 2 and {event["doing"] for event in lost} == {"generate"}
    assert any("within 4 s" in event["error"] and "stopped" in event["account"] for event in lost)
    assert found[-1]["replaced"] == 2
    assert not actors(tmp_path.name)


def test_weights_that_did_not_arrive_are_told_by_the_tensors_name(cluster, tmp_path):
    with pytest.raises(WeightsDiffer, match=r"other values in blocks\.0\.mlp\.up\.weight"):
        run(tmp_path / "run", "rl.rollout.actors=1", "rl.rollout.engine=rl_engines:Forgetful")


@pytest.mark.parametrize("dies", [False, True], ids=["raises", "dies"])
def test_a_prompt_that_fails_again_and_again_is_left_out_and_reported(dies, cluster, tmp_path):
    picky = (
        *("rl.rollout.actors=1", "rl.rollout.prompts_per_call=4", "rl.rollout.retries=0", "train.steps=1"),
        *("rl.rollout.engine=rl_engines:Picky", f"rl.rollout.options={{token: 112, dies: {str(dies).lower()}}}"),
    )
    found = run(tmp_path / "run", *picky, "rl.rollout.max_failures=3", "train.global_batch=26")
    dropped = events(tmp_path / "run", "prompt_dropped")
    assert sum(record["dropped"] for record in found) == len(dropped) > 0
    assert all(("to my taste" in event["error"]) is not dies for event in dropped)
    if not dies:
        with pytest.raises(PromptsFailed, match=r"has no answer: .*at most 0 may"):
            run(tmp_path / "strict", *picky, "train.global_batch=26")


def test_actors_that_die_again_and_again_end_the_run(cluster, tmp_path):
    options = ("rl.rollout.engine=rl_engines:Picky", "rl.rollout.options={token: 112, dies: true}")
    with pytest.raises(RolloutFailed, match="2 rollout actors were lost in a row"):
        run(tmp_path / "run", *ALONE, *options, "train.global_batch=26", "rl.rollout.max_losses=2")


def test_a_reward_worker_killed_or_stopped_is_replaced(cluster, local, tmp_path):
    hurt: list[int] = []
    trainer = PPO(
        recipe_from_text(LETTERS, overrides=["strategy={name: single}", "rl.reward.limit_seconds=3"]),
        run_dir=tmp_path / "run",
    )
    for _ in trainer.steps():
        workers = [worker.pid for worker in trainer._rollout.rewards._pool._workers]
        if len(hurt) < 2:
            hurt += workers
            os.kill(workers[0], signal.SIGKILL if len(hurt) == 1 else signal.SIGSTOP)
    assert len(set(hurt)) == 2
    assert facts(metrics(tmp_path / "run")) == facts(local)


def test_a_reward_that_fails_is_reported_with_function_and_sample(cluster, tmp_path):
    reward = "rl.reward={function: 'rl_rewards:picky', retries: 0, max_failures: 20}"
    found = run(tmp_path / "run", *ALONE, reward, "train.steps=2")
    failed = events(tmp_path / "run", "reward_failed")
    assert failed and all("'picky'" in event["error"] and "sample" in event["error"] for event in failed)
    assert all(record["reward"] == record["reward"] for record in found)
    with pytest.raises(RewardFailed, match="'picky' raised ValueError: too long"):
        run(tmp_path / "strict", reward.replace("20", "0"), "train.steps=2")


# --- ahead of training


def test_generation_ahead_stays_within_its_bound_and_does_not_depend_on_who_answers(cluster, local, tmp_path):
    ahead = (*POOL, "rl.max_staleness=2")
    whole = run(tmp_path / "whole", *ahead)
    assert [record["staleness_max"] for record in whole] == [0, 1, 2, 2, 2]
    assert whole[0]["reward"] == local[0]["reward"]
    assert whole[0]["loss"] == pytest.approx(local[0]["loss"], rel=1e-5)  # its weights are 1 but for rounding
    assert all(abs(record["importance"] - 1) < 0.1 for record in whole)
    where = tmp_path / "pids"
    options = slow(where, 0.2)
    with meanwhile(lambda: os.kill(someone(where), signal.SIGKILL)):
        hurt = run(tmp_path / "hurt", *ahead, *options)
    assert facts(hurt) == facts(whole)


@pytest.mark.parametrize("buffer", ["save", "requeue"])
def test_a_run_ahead_of_training_is_resumed(buffer, cluster, tmp_path):
    ahead = (*ALONE, "rl.max_staleness=1", f"rl.buffer={buffer}", "checkpoint={every: 2}")
    trainer = PPO(recipe_from_text(LETTERS, overrides=["strategy={name: single}", *ahead]), run_dir=tmp_path / "run")
    steps = trainer.steps()
    for _ in range(3):
        next(steps)
    steps.close()
    earlier = start_member("earlier", {"CPU": 0}, own={"name": f"{trainer.run.id}.rollout.0123ab.0.1"})
    found = run(tmp_path / "run", *ahead)
    with pytest.raises(RayActorError):
        ray.get(earlier.where.remote(), timeout=20)
    assert len(events(tmp_path / "run", "rollout_stale_ended")) == 1
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    assert found[2]["staleness_max"] == (1 if buffer == "save" else 0)
    if buffer == "save":
        assert facts(found) == facts(run(tmp_path / "whole", *ahead))


def test_training_and_generation_overlap(cluster, tmp_path):
    """Where both take their time, steps take little more than the longer."""
    seconds = {}
    for name, staleness in (("sync", 0), ("ahead", 1)):
        options = ("rl.rollout.actors=1", *slow(tmp_path / f"pids-{name}", 0.5), f"rl.max_staleness={staleness}")
        trainer = Lazy(
            recipe_from_text(LETTERS, overrides=["strategy={name: single}", *options, "train.steps=7"]),
            run_dir=tmp_path / name,
        )
        taken = []
        for _ in trainer.steps():
            taken.append(time.monotonic())
        seconds[name] = statistics.median(np.diff(taken)[1:])  # the machine may be busy with something else
        assert {"generate", "reward", "sync", "logprobs", "update"} <= trainer.seconds.keys()
    assert seconds["ahead"] < 0.8 * seconds["sync"], seconds


class Lazy(GRPO):
    """Training that takes as long as generation does."""

    def learn(self, step, samples, control):
        """See PolicyGradient."""
        time.sleep(0.5)
        return super().learn(step, samples, control)


# --- the job as a whole


def test_a_killed_run_goes_on_bit_by_bit_and_leaves_no_actor(cluster, local, tmp_path):
    folder, recipe = tmp_path / "killed", tmp_path / "killed.yaml"
    recipe.write_text(LETTERS)
    shape = ("--strategy", "ddp", "--nproc", "1", "--run-dir", folder)
    options = (*ALONE, f"rl.rollout.address={cluster}", "checkpoint={every: 1}", "train.steps=5")
    with meanwhile(lambda: kill_rank(folder, at=2)):
        unitrain("launch", recipe, *shape, *options, cwd=tmp_path).succeeded()
    assert len(events(folder, "start")) == 2
    assert facts(metrics(folder)) == facts(local)
    gone(folder.name)


def kill_rank(folder: Path, *, at: int) -> None:
    """SIGKILL to rank 0 once the run has saved that step."""
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints").exists() or len(checkpoints(folder)) < at:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(rank_of(folder), signal.SIGKILL)


def rank_of(folder: Path) -> int:
    """The process of rank 0, as the agent has written it down."""
    record = json.loads((folder / "agent.json").read_text())
    return int(record["ranks"]["0"])


def gone(name: str) -> None:
    """Wait until no actor of the run is left."""
    deadline = time.monotonic() + 20
    while actors(name) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not actors(name)


def test_a_killed_driver_takes_its_private_ray_with_it(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(LETTERS)
    where = tmp_path / "pids"
    shape = ("--strategy", "single", "--nproc", "1", "--run-dir", tmp_path / "run")
    command = [COMMAND, "launch", recipe, *shape, *ALONE, *slow(where), "recovery.restarts=0"]
    environ = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    launched = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ, process_group=0
    )
    try:
        before = family(someone(where))
        session = Path(re.search(r"=(/[^=\0]*/uray-[^/\0]+)", Path(f"/proc/{before[0]}/cmdline").read_text())[1])
        os.kill(rank_of(tmp_path / "run"), signal.SIGKILL)
    finally:
        os.killpg(launched.pid, signal.SIGKILL)
        launched.wait()
    deadline = time.monotonic() + 30
    while (left := [pid for pid in before if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    shutil.rmtree(session, ignore_errors=True)
    assert not left


def family(pid: int) -> list[int]:
    """The process, its siblings and its parent: a raylet and its workers.

    Two agents of Ray's own look for its dead control store a minute longer.
    """
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    found = [line.split(maxsplit=2) for line in listed.splitlines()[1:]]
    return [parent, *(int(mine) for mine, theirs, what in found if int(theirs) == parent and "Agent" not in what)]


def test_a_cluster_that_is_too_small_is_told_at_once(cluster, tmp_path):
    with pytest.raises(UserError, match="20 rollout actors of 1 CPU each need 20, and the Ray cluster has 8"):
        run(tmp_path / "run", "rl.rollout.actors=20")


def test_a_mistake_in_the_recipe_ends_the_launch_before_anything_starts(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(LETTERS)
    ended = unitrain("launch", recipe, "--run-dir", tmp_path / "run", "rl.rollout.actor=2", cwd=tmp_path)
    assert ended.code == 78 and "did you mean 'rl.rollout.actors'" in ended.err
    assert not (tmp_path / "run").exists()
