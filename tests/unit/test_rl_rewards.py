"""Reward functions in worker processes: what they may be, how they may fail, and what is said then."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unitrain.errors import UserError
from unitrain.rl.rewards import Learned, Query, Reward, RewardFailed, Rewards


def queries(count: int, **columns: Sequence[Any]) -> list[Query]:
    return [
        Query(f"step 3, prompt {row}", "2+2=", str(row), {name: values[row] for name, values in columns.items()})
        for row in range(count)
    ]


def right(completion: str, answer: str) -> float:
    return float(completion == answer)


def rough(completion: str) -> Any:
    """Every way to fail, by the completion."""
    match completion:
        case "1":
            raise ValueError("no such answer")
        case "2":
            time.sleep(60)
        case "3":
            os._exit(3)
        case "4":
            os.kill(os.getpid(), signal.SIGKILL)
        case "5":
            return float("nan")
        case "6":
            return "good"
        case "7":
            return [1.0, 2.0]
        case "8":
            return None
        case "9":
            return np.float32(0.5)
        case "10":
            return True
    return 1.0


def test_every_failure_names_the_function_and_the_sample_and_spoils_no_other() -> None:
    begin = time.monotonic()
    with Rewards([Reward(rough), Reward(lambda prompt: len(prompt), 0.5, "length")], limit_seconds=1) as rewards:
        found = rewards.score(queries(11))
        assert np.isnan(found.rewards).tolist() == [1 <= row <= 8 for row in range(11)]
        assert found.rewards[[0, 9, 10]].tolist() == [3.0, 2.5, 3.0]
        assert found.parts["length"].tolist() == [4.0] * 11
        again = rewards.score(queries(1))  # the pool goes on
        assert again.rewards.tolist() == [3.0]
    assert time.monotonic() - begin < 15
    said = [str(failure) for failure in found.failures]
    assert [failure.row for failure in found.failures] == list(range(1, 9))
    assert said[0].startswith(f"the reward function 'rough' raised ValueError: no such answer ({__file__}:") and said[
        0
    ].endswith("on step 3, prompt 1")
    assert said[1:] == [
        "the reward function 'rough' took longer than 1 s on step 3, prompt 2",
        "the reward function 'rough' ended its process (exit code 3) on step 3, prompt 3",
        "the reward function 'rough' ended its process (SIGKILL) on step 3, prompt 4",
        "the reward function 'rough' returned nan, not a finite number, on step 3, prompt 5",
        "the reward function 'rough' returned a str, not a number, on step 3, prompt 6",
        "the reward function 'rough' returned a list of 2, not a number, on step 3, prompt 7",
        "the reward function 'rough' returned None, not a number, on step 3, prompt 8",
    ]
    assert found.require(8) is found
    with pytest.raises(
        RewardFailed, match=r"^the reward function 'rough' raised .* prompt 1; so did 7 more calls; at "
    ):
        found.require(7)


def test_a_function_that_fails_now_and_then_is_called_again(tmp_path: Path) -> None:
    def flaky(completion: str) -> float:
        mark = tmp_path / completion
        if mark.exists():
            return 1.0
        mark.touch()
        raise OSError("busy")

    with Rewards(flaky, retries=1) as rewards:
        assert rewards.score(queries(4)).failures == []
    for mark in tmp_path.iterdir():
        mark.unlink()
    with Rewards(flaky, retries=0) as rewards:
        assert len(rewards.score(queries(4)).failures) == 4


def test_a_worker_that_was_killed_between_two_steps_costs_no_sample() -> None:
    with Rewards(right, processes=2, retries=0) as rewards:
        rewards.score(queries(8, answer=["1"] * 8))
        for worker in rewards._pool._workers:
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.2)
        assert rewards.score(queries(8, answer=["1"] * 8)).failures == []


class Judge:
    """A callable with something to remember."""

    def __init__(self, good: str) -> None:
        self.good = good

    def __call__(self, completion: str) -> float:
        return float(completion == self.good)

    def method(self, *, completion: str, **columns: Any) -> float:
        return float(completion == self.good) + len(columns)


def test_any_callable_is_a_reward() -> None:
    """Also those that no pickle takes: lambdas, closures, bound methods, partials, objects."""
    good = "1"
    functions = [
        Reward(right),
        Reward(lambda completion: completion == good, name="lambda"),
        Reward(Judge("1"), name="object"),
        Reward(Judge("1").method, name="method"),
        Reward(functools.partial(right, answer="1"), name="partial"),
        Reward("operator:eq", name="path"),
    ]
    with pytest.raises(UserError, match="positional-only"):
        Rewards(functions)
    with Rewards(functions[:-1], processes=1) as rewards:
        found = rewards.score(queries(3, answer=["1", "1", "1"]))
    assert found.failures == []
    method = found.parts.pop("method")
    assert method.tolist() == [2.0, 3.0, 2.0]  # `prompt` and `answer` besides
    for part in found.parts.values():
        assert part.tolist() == [0.0, 1.0, 0.0]


def test_functions_that_can_be_imported_run_in_a_fresh_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They see nothing of this process: its threads, its devices, its memory."""
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent("""
        import sys

        def torch_is_here(completion):
            return "torch" in sys.modules

        def length(completion, bonus=0.5):
            return len(completion) + bonus
        """),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import torch  # noqa: F401

    with Rewards(["my_rewards:torch_is_here", Reward("my_rewards:length", 10)], processes=1) as rewards:
        found = rewards.score(queries(2, bonus=[1, np.float32(2)]))
    assert found.failures == []
    assert found.parts["torch_is_here"].tolist() == [0, 0]
    assert found.rewards.tolist() == [20.0, 30.0]


def test_learned_rewards_score_all_samples_at_once_in_this_process() -> None:
    calls = []

    def score(asked: Sequence[Query]) -> list[float]:
        calls.append([query.completion for query in asked])
        return [0.0, float("inf"), 2.0]

    with Rewards([Learned(score, "model", weight=2.0), Reward(lambda: 1, name="one")]) as rewards:
        found = rewards.score(queries(3))
    assert calls == [["0", "1", "2"]]
    assert found.rewards.tolist()[::2] == [1.0, 5.0] and np.isnan(found.rewards[1])
    assert [str(failure) for failure in found.failures] == [
        "the reward function 'model' returned inf, not a finite number, on step 3, prompt 1"
    ]
    with Rewards(Learned(lambda asked: [1.0], "short")) as rewards, pytest.raises(RewardFailed, match=r"'short'.* 3 "):
        rewards.score(queries(3))


def test_mistakes_are_named_before_anything_is_scored() -> None:
    with Rewards(right) as rewards:
        with pytest.raises(UserError, match=r"'right' takes 'answer', did you mean 'answers'\?"):
            rewards.score(queries(1, answers=["1"]))
        with pytest.raises(UserError, match="cannot be sent to its process: a bytes is no JSON"):
            rewards.score(queries(1, answer=[b"1"]))
    with pytest.raises(UserError, match=r"names that differ.*\['right', 'right'\]"):
        Rewards([right, right])
    with pytest.raises(UserError, match="is a int; give a callable"):
        Rewards([Reward(3, name="three")])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no module 'nowhere'"):
        Rewards("nowhere:function")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["fresh", "forked"])
def test_workers_end_with_the_process_that_is_killed(kind: str, tmp_path: Path) -> None:
    """Also one that is stuck in a call, which no time limit ends any more."""
    (tmp_path / "stuck.py").write_text(
        textwrap.dedent("""
        import os, sys, time
        from unitrain.rl.rewards import Query, Rewards

        def stuck(completion):
            open(completion, "w").write(str(os.getpid()))
            time.sleep(600)

        if __name__ == "__main__":
            function = "stuck:stuck" if sys.argv[1] == "fresh" else stuck
            Rewards(function, limit_seconds=600).score([Query("", "", name) for name in sys.argv[2:]])
        """),
        encoding="utf-8",
    )
    marks = [tmp_path / "one", tmp_path / "two"]
    command = [sys.executable, "stuck.py", kind, *map(str, marks)]
    parent = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    try:
        pids = [int(wait_for(mark)) for mark in marks]
        assert all(alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait()
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.05)


def wait_for(mark: Path) -> str:
    end = time.monotonic() + 30
    while not (mark.exists() and mark.read_text(encoding="utf-8")):
        assert time.monotonic() < end, "no worker began"
        time.sleep(0.05)
    return mark.read_text(encoding="utf-8")
