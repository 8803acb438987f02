"""How a drill is planned: what is understood, and what is refused before anything starts."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from unitrain.chaos.drill import Trouble
from unitrain.chaos.faults import Corrupt, FullDisk, Kill, Sigterm, Stop
from unitrain.chaos.plan import Plan, make_plan
from unitrain.chaos.verdict import Verdict
from unitrain.errors import UserError
from unitrain.heartbeat import Heartbeat, Heartbeats, Phase
from unitrain.recipe_file import recipe_from_text

pytestmark = pytest.mark.fast

TRAINERS = Path(__file__).parents[1] / "integration" / "trainers.py"
RECIPE = f"""\
trainer: {TRAINERS}:Rows
train: {{steps: 40, global_batch: 10}}
strategy: {{name: ddp}}
launcher: {{nproc: 2}}
checkpoint: {{every: 7, path: /nowhere}}
"""


def planned(asked: Mapping[str, list[str]], *overrides: str) -> Plan:
    return make_plan(recipe_from_text(RECIPE, overrides=overrides), asked)


def test_faults_come_in_the_order_of_their_steps_and_every_loss_is_logged() -> None:
    asked = {
        "stop": ["rank=0,step=15"],
        "kill": ["step=20,rank=1", "rank=1,step=7"],
        "sigterm": ["step=12"],
        "corrupt": ["newest"],
        "enospc": ["save=2"],
    }
    plan = planned(asked)
    assert plan.faults == (
        FullDisk(save=2),
        Kill(rank=1, step=7),
        Sigterm(step=12),
        Stop(rank=0, step=15),
        Kill(rank=1, step=20),
        Corrupt(step=30),
    )
    assert plan.saves == 6
    assert (plan.recipe.train.log_every, plan.recipe.checkpoint.path) == (1, None)


@pytest.mark.parametrize(
    ("asked", "overrides", "message"),
    [
        ({}, (), "nothing is to go wrong"),
        ({"kill": ["rank=1"]}, (), "has no step; write --kill rank=1,step=7"),
        ({"kill": ["rank=1,stp=3"]}, (), "'stp=3' is not understood; write --kill rank=1,step=7"),
        ({"kill": ["rank=2,step=3"]}, (), "name one from 0 to 1"),
        ({"kill": ["rank=1,step=40"]}, (), "name one from 1 to 39"),
        ({"kill": ["rank=1,step=3"]}, ("recovery.restarts=0",), "recovery.restarts is 0"),
        ({"sigterm": ["step=0"]}, (), "name one from 1 to 39"),
        ({"corrupt": ["oldest"]}, (), "only the newest checkpoint"),
        ({"corrupt": ["newest,step=7"]}, (), "no older checkpoint"),
        ({"corrupt": ["newest"]}, ("checkpoint.keep=1",), "keep two"),
        ({"enospc": ["save=6"]}, (), "after 1 to 5 of its 6 saves"),
        ({"kill": ["rank=1,step=3"]}, ("checkpoint.every=0",), "give checkpoint.every=N"),
        ({"kill": ["rank=1,step=3"]}, ("launcher.nodes=2", "launcher.name=torchrun"), "launcher.nodes is 2"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(asked, overrides, message) -> None:
    with pytest.raises(UserError, match=message):
        planned(asked, *overrides)


def test_a_drill_passes_only_when_every_fault_came_and_nothing_tells_the_runs_apart() -> None:
    survived = Trouble(Sigterm(step=3), happened="run told to stop")
    good = {"troubles": [survived], "exit_code": 0, "samples_lost": 0, "samples_repeated": 0, "first_other_step": None}
    assert Verdict(**good).passed
    never = Trouble(Kill(rank=0, step=4))
    assert never.verdict == "failed: it never came"
    for changed in (
        {"troubles": [survived, never]},
        {"troubles": [Trouble(Sigterm(step=3), happened="told", error="it ended")]},
        {"exit_code": 93},
        {"samples_lost": 10},
        {"samples_repeated": 10},
        {"first_other_step": 8},
        {"weights_differ": ["model param w"]},
        {"error": "no checkpoint"},
        {"audit_problems": ["step 3 is missing"]},
    ):
        assert not Verdict(**{**good, **changed}).passed


def test_another_process_sees_the_heartbeats_and_cannot_write_them() -> None:
    ours = Heartbeats(2)
    rank = Heartbeat.of(f"{os.dup(ours.fd)}:1")
    rank.began(4)
    rank.beat(Phase.STEP, 5)
    seen = Heartbeats.of_agent(os.getpid())
    assert seen is not None
    assert (seen.pulse(1), seen.pulse(0).beats) == (ours.pulse(1), 0)
    assert seen.pulse(1).step == 5
    with pytest.raises(PermissionError):
        mmap.mmap(seen.fd, 0)
    seen.close()
    ours.close()
