"""How `unitrain verify` plans, compares and reports, without starting a run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unitrain import registry
from unitrain.checkpoint import CheckpointReader, Saver, newest
from unitrain.errors import MissingExtra, RecipeError, Refused, UnknownName, UserError
from unitrain.recipe_file import recipe_from_text
from unitrain.strategy import Shard
from unitrain.verify.compare import Comparison, Weights, compare_weights, relative
from unitrain.verify.figure import draw
from unitrain.verify.plan import BAND, CLOSE, TIGHT, LeftOut, Plan, make_plan, tier_of
from unitrain.verify.table import show
from unitrain.verify.trial import Outcome
from unitrain.verify.verification import Row, Verification, as_json

pytestmark = pytest.mark.fast

RECIPE = """\
name: tiny
trainer: unitrain.tasks:Classification
model: {name: mlp, in_features: 64, hidden: [8], num_classes: 10}
data: {name: digits}
train: {steps: 500, global_batch: 8, log_every: 50, eval_every: 5}
strategy: {name: fsdp2, options: {reshard_after_forward: false}}
checkpoint: {every: 3, path: /tmp/elsewhere}
"""


def recipe(*overrides: str) -> Any:
    return recipe_from_text(RECIPE, overrides=overrides)


def entries_with(monkeypatch: pytest.MonkeyPatch, **changed: registry.Entry) -> None:
    """A registry with no other strategies than these and the three that need nothing."""
    few = {name: registry.STRATEGIES[name] for name in ("single", "ddp", "fsdp2")} | changed
    monkeypatch.setattr(registry, "STRATEGIES", few)


def absent() -> registry.Entry:
    return registry.Entry(
        path="nowhere:X", summary="", framework="torch", requires="no_such_package", package="Nothing", extra="nothing"
    )


# --- the plan ----------------------------------------------------------------------------------------------------


def test_all_means_every_strategy_that_can_run_and_the_others_say_why_not(monkeypatch):
    shard_size = "strategy={name: fsdp2, options: {shard_size: 2}}"
    entries_with(monkeypatch, other=absent())
    plan = make_plan(recipe(shard_size), "all", 3, 20)
    assert (plan.reference.strategy, plan.reference.ranks) == ("single", 1)
    assert [(trial.strategy, trial.ranks) for trial in plan.trials] == [("ddp", 3)]
    assert [(name, why) for name, why, _ in plan.left_out] == [("fsdp2", "refused"), ("other", "not installed")]
    reasons = [reason for _, _, reason in plan.left_out]
    assert "does not divide 3 ranks" in reasons[0]
    assert reasons[1] == "strategy 'other' needs Nothing: pip install 'unitrain[nothing]'"


def test_every_run_logs_each_loss_evaluates_never_and_saves_once_in_its_own_folder():
    plan = make_plan(recipe(), "ddp", 2, 20)
    for trial in (plan.reference, *plan.trials):
        changed = trial.recipe
        assert (changed.train.steps, changed.train.log_every, changed.train.eval_every) == (20, 1, 0)
        assert (changed.checkpoint.every, changed.checkpoint.path) == (None, None)
        assert changed.launcher.name == "local"
        assert changed.train.global_batch == 8


def test_the_recipes_options_go_to_the_recipes_strategy_alone():
    plan = make_plan(recipe(), "ddp,fsdp2", 2, 20)
    options = {trial.strategy: dict(trial.recipe.strategy.options) for trial in (plan.reference, *plan.trials)}
    assert options == {"single": {}, "ddp": {}, "fsdp2": {"reshard_after_forward": False}}


def test_what_was_asked_for_by_name_must_be_able_to_run(monkeypatch):
    entries_with(monkeypatch, other=absent())
    with pytest.raises(MissingExtra, match="needs Nothing"):
        make_plan(recipe(), "ddp,other", 2, 20)
    with pytest.raises(Refused, match="does not divide"):
        make_plan(recipe("strategy={name: fsdp2, options: {shard_size: 2}}"), "fsdp2", 3, 20)
    with pytest.raises(UnknownName, match="did you mean 'fsdp2'"):
        make_plan(recipe(), "fsdp3", 2, 20)
    with pytest.raises(RecipeError, match="9 ranks cannot share"):
        make_plan(recipe(), "all", 9, 20)


def test_names_are_taken_once_and_the_reference_is_no_trial():
    assert [trial.strategy for trial in make_plan(recipe(), "ddp, single,ddp fsdp2", 2, 20).trials] == ["ddp", "fsdp2"]
    for nonsense in ("", " ,", "all,ddp"):
        with pytest.raises(UserError, match="--strategies is"):
            make_plan(recipe(), nonsense, 2, 20)
    with pytest.raises(UserError, match="nothing to compare with 'single'"):
        make_plan(recipe(), "single", 2, 20)


@pytest.mark.parametrize(
    ("overrides", "tier", "because"),
    [
        ((), "tight", "fp32 without dropout"),
        (("train.precision=bf16",), "band", "precision bf16"),
        (("strategy.options={param_dtype: bf16}",), "band", "param_dtype bf16"),
        (("trainer=a:B", "model={name: own, attn_dropout: 0.1}"), "band", "attn_dropout 0.1"),
        (("trainer=a:B", "model={name: own, attn_dropout: 0.0}"), "tight", "fp32 without dropout"),
    ],
)
def test_the_tier_follows_from_the_recipe(overrides, tier, because):
    found = tier_of(recipe(*overrides))
    assert found.name == tier
    assert because in found.because


def test_another_framework_is_close_and_a_tier_can_be_given(monkeypatch):
    jax = registry.Entry(path="json:loads", summary="", framework="jax")
    entries_with(monkeypatch, jax=jax)
    assert tier_of(recipe("strategy={name: jax}")) == CLOSE
    given = make_plan(recipe(), "ddp", 2, 20, tier="band").trials[0].tier
    assert (given.name, given.losses, given.because) == ("band", BAND.losses, "as asked for")
    assert [tier.losses for tier in (TIGHT, CLOSE, BAND)] == [1e-5, 1e-4, 2e-2]


# --- losses ------------------------------------------------------------------------------------------------------


def comparison(differences: list[float], weights: float = 0.0) -> Comparison:
    return Comparison(tier=TIGHT, differences=differences, weights=Weights(weights, "model w", 0, 10))


def test_differences_are_relative_to_the_reference_and_infinite_where_there_is_no_number():
    assert relative([2.0, 1.0, 0.0], [1.0, 1.0, 0.0]) == [1.0, 0.0, 0.0]
    assert relative([1.0, None, 1.0], [0.0, 1.0, None]) == [math.inf] * 3


def test_the_first_step_beyond_the_tier_decides():
    assert comparison([0.0, 1e-5, 9e-6]).verdict == "agrees"
    found = comparison([0.0, 2e-5, 1.0])
    assert (found.verdict, found.first_beyond, found.largest) == ("losses differ", 2, 1.0)
    assert comparison([0.0], weights=2e-3).verdict == "weights differ"
    assert not comparison([0.0], weights=math.inf).agrees
    assert not comparison([math.inf]).agrees


# --- weights -----------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, tensors: Mapping[tuple[str, str], Any], role: str = "model") -> CheckpointReader:
    saver = Saver(
        str(folder), writer=0, writers=1, nonce="a", keep=1, asynchronous=False, producer={}, report=lambda _: None
    )

    def shard(kind: str, name: str, data: Any) -> Shard:
        dtype = "bfloat16" if data.dtype == np.uint16 else str(data.dtype)
        return Shard(name, kind, dtype, data.shape, (0,) * data.ndim, data)

    saver.save(1, {role: [shard(*pair, data) for pair, data in tensors.items()]}, {})
    saver.wait()
    saver.close()
    saved = newest(str(folder))
    assert saved is not None
    return CheckpointReader(saved.folder)


def params(**values: Any) -> dict[tuple[str, str], Any]:
    return {("param", name): np.asarray(value, dtype=np.float32) for name, value in values.items()}


def test_weights_differ_by_the_worst_tensor_relative_to_its_largest(tmp_path):
    theirs = checkpoint(tmp_path / "a", params(a=[[1.0, -10.0]], b=[2.0, 4.0], c=3.0))
    ours = checkpoint(tmp_path / "b", params(a=[[1.0, -10.1]], b=[2.2, 4.0], c=3.0))
    found = compare_weights(ours, theirs)
    assert found.difference == pytest.approx(0.05)
    assert (found.tensor, found.left_out, found.compared) == ("model b", 0, 5)
    assert compare_weights(theirs, theirs).difference == 0


@pytest.mark.parametrize(
    ("ours", "where"),
    [
        (params(a=[1.0, 2.0]), "model b"),
        (params(a=[1.0, 2.0], b=[[1.0]]), "model b"),
        (params(a=[1.0, 2.0], b=[1.0], c=[1.0]), "model c"),
        (params(a=[1.0, 2.0], b=[math.nan]), "model b"),
        (params(a=[1.0, math.inf], b=[1.0]), "model a"),
    ],
    ids=["lost", "other shape", "one more", "NaN", "infinity"],
)
def test_a_tensor_that_is_missing_or_no_number_is_infinitely_far(tmp_path, ours, where):
    theirs = checkpoint(tmp_path / "a", params(a=[1.0, 2.0], b=[1.0]))
    found = compare_weights(checkpoint(tmp_path / "b", ours), theirs)
    assert (found.difference, found.tensor) == (math.inf, where)


def test_another_role_is_infinitely_far(tmp_path):
    theirs = checkpoint(tmp_path / "a", params(a=1.0))
    assert compare_weights(checkpoint(tmp_path / "b", params(a=1.0), role="other"), theirs).difference == math.inf


def test_bfloat16_is_read_as_the_numbers_that_its_bits_mean(tmp_path):
    def bits(value: float) -> Any:
        return {("param", "a"): (np.array([value], np.float32).view(np.uint32) >> 16).astype(np.uint16)}

    theirs, ours = checkpoint(tmp_path / "a", bits(2.0)), checkpoint(tmp_path / "b", bits(3.0))
    assert compare_weights(ours, theirs).difference == 0.5


def test_weights_that_only_rounding_moves_do_not_count_and_all_others_do(tmp_path):
    second = {("adamw.v", "key_bias"): np.full(4, 1e-18, np.float32), ("adamw.v", "w"): np.full(4, 1e-4, np.float32)}
    theirs = checkpoint(tmp_path / "a", params(key_bias=[0.01] * 4, w=[1.0] * 4) | second)
    walked = checkpoint(tmp_path / "b", params(key_bias=[-0.01] * 4, w=[1.0] * 4) | second)
    assert compare_weights(walked, theirs) == Weights(0.0, "", 4, 4)
    broken = checkpoint(tmp_path / "c", params(key_bias=[0.01] * 4, w=[1.0, 1.0, 0.0, 1.0]) | second)
    assert compare_weights(broken, theirs).difference == 1.0


# --- the report --------------------------------------------------------------------------------------------------


def outcome(strategy: str, losses: list[float | None], error: str = "") -> Outcome:
    names = {"single": "ddp"}.get(strategy, strategy)
    plan = make_plan(recipe(), names, 2, max(len(losses), 1))
    return Outcome(
        trial=plan.reference if strategy == "single" else plan.trials[0],
        folder=Path("out") / strategy,
        losses=losses,
        seconds=1.25,
        memory_bytes=10**8,
        checkpoint="",
        error=error,
    )


def verification(*rows: Row) -> Verification:
    reference = Row(outcome("single", [3.0, 2.0]), is_reference=True)
    return Verification([reference, *rows], (LeftOut("zero9", "not installed", "needs Nine: pip install nine"),))


AGREES = Row(outcome("ddp", [3.0, 2.0]), comparison([0.0, 1e-7]))
DIFFERS = Row(outcome("fsdp2", [3.0, 2.5]), comparison([0.0, 0.25]))
FAILED = Row(outcome("fsdp2", [3.0], error="rank 1 was killed by SIGKILL"))


@pytest.mark.parametrize(
    ("rows", "passed"), [([AGREES], True), ([], False), ([AGREES, DIFFERS], False), ([AGREES, FAILED], False)]
)
def test_it_passes_when_something_was_compared_and_all_of_it_agrees(rows, passed):
    assert verification(*rows).passed is passed


def test_the_table_says_everything_that_json_says(capsys):
    found = verification(AGREES, DIFFERS, FAILED, Row(outcome("ddp", [3.0, 2.0]), comparison([0.0, 0.0], weights=1.0)))
    show(found)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in lines[1:6]] == ["single", "ddp", "fsdp2", "fsdp2", "ddp"]
    assert lines[1].endswith("reference")
    assert lines[2].split()[1:] == ["2", "1.0e-07", "none", "0", "1.2", "100", "MB", "tight", "agrees"]
    assert lines[3].split()[2:4] == ["2.5e-01", "2"]
    assert lines[3].endswith("losses differ")
    assert lines[4].endswith("failed")
    assert "fsdp2 failed: rank 1 was killed by SIGKILL (see out/fsdp2)" in lines
    assert "ddp: most in model w" in lines
    assert lines[-1] == "not run: zero9, not installed: needs Nine: pip install nine"
    plan = Plan(reference=found.rows[0].outcome.trial, trials=(), left_out=())
    document = json.loads(as_json(found, plan))
    assert [row["verdict"] for row in document["rows"]][1:3] == ["agrees", "losses differ"]
    assert document["rows"][2]["first_step_beyond"] == 2
    assert document["rows"][2]["tier"]["name"] == "tight"
    assert document["passed"] is False
    assert document["not_run"][0]["strategy"] == "zero9"


def test_json_has_null_for_what_is_not_finite():
    row = Row(outcome("ddp", [3.0, None]), comparison([0.0, math.inf], weights=math.inf))
    found = verification(row)
    text = as_json(found, Plan(reference=found.rows[0].outcome.trial, trials=(), left_out=()))
    assert "Infinity" not in text
    assert json.loads(text)["rows"][1]["loss_difference"] is None


def test_the_picture_is_drawn_also_of_curves_that_differ_or_break_off(tmp_path):
    pytest.importorskip("matplotlib")
    broken = (outcome("fsdp2", [3.0, None]), comparison([0.0, math.inf]))
    path = tmp_path / "verify.png"
    draw(path, "tiny", outcome("single", [3.0, 2.0]), [(AGREES.outcome, comparison([0.0, 0.0])), broken])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"the picture needs matplotlib: pip install 'unitrain\[plot\]'"):
        draw(tmp_path / "verify.png", "tiny", outcome("single", [3.0]), [])
