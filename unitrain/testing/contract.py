"""The conformance suite for strategies: subclass it in a test file, name your strategy, and run pytest.

    from unitrain.testing import StrategyContract

    class TestMine(StrategyContract):
        strategy = "my_package.mine:Mine"

Every check starts real processes on this machine and compares with a numpy oracle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest

from unitrain.checkpoint import CheckpointReader
from unitrain.cursor import sample_ids
from unitrain.digest import box_digest

from .scenario import FIRST, GLOBAL_BATCH, OPTIMIZER, SECOND, SEED, Outcome, rate, run_scenario
from .toy import NUM_ROWS, SHAPES, Oracle

TIGHT = 1e-5  # relative, fp32 against float64 and across numbers of ranks
STATE_KINDS = ("param", "adamw.m", "adamw.v")


class StrategyContract:
    """What every strategy promises. `ranks` are the world sizes to try, `options` the strategy's own."""

    strategy: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)
    micro_batch: ClassVar[int | None] = 2
    accelerator: ClassVar[bool] = False  # True: on this machine's GPUs, one a rank; False: on CPU, GPU or not

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
        """The scenario on `single`, whose checkpoint the others load."""
        return run_scenario(tmp_path_factory.mktemp("reference") / "single", "single", 1, micro_batch=None)

    @pytest.fixture(scope="class")
    @classmethod
    def outcomes(cls, reference: Outcome, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
        """The scenario on every number of ranks: each starts its processes once."""
        folder = tmp_path_factory.mktemp("contract")
        return [
            run_scenario(
                folder / f"{ranks}-ranks",
                cls.strategy,
                ranks,
                options=cls.options,
                micro_batch=cls.micro_batch,
                accelerator=cls.accelerator,
                load_from=reference.checkpoints["first"],
            )
            for ranks in cls.ranks
        ]

    def test_initial_weights_are_the_same_on_every_number_of_ranks(
        self, outcomes: list[Outcome], reference: Outcome
    ) -> None:
        for outcome in outcomes:
            check_initial_weights(outcome, reference)

    def test_every_step_follows_the_oracle(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            check_follows_the_oracle(outcome)

    def test_a_checkpoint_holds_parameters_and_moments_as_the_oracle_has_them(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            check_state_follows_the_oracle(outcome)

    def test_resuming_on_the_same_ranks_changes_no_bit(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            check_resume_is_exact(outcome)

    def test_a_checkpoint_of_another_strategy_loads_without_changing_a_bit(
        self, outcomes: list[Outcome], reference: Outcome
    ) -> None:
        for outcome in outcomes:
            check_foreign_checkpoint_is_kept(outcome, reference)

    def test_a_run_of_another_strategy_continues_on_its_curve(
        self, outcomes: list[Outcome], reference: Outcome
    ) -> None:
        for outcome in outcomes:
            check_foreign_run_continues(outcome, reference)

    def test_a_non_finite_gradient_of_one_rank_changes_nothing_on_any(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            check_non_finite_is_skipped(outcome)

    def test_evaluation_weighs_every_row_once(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            check_evaluation(outcome)

    def test_calls_see_the_trained_model_in_evaluation_mode(self, outcomes: list[Outcome], reference: Outcome) -> None:
        for outcome in outcomes:
            check_call(outcome, reference)

    def test_digests_do_not_depend_on_sharding(self, outcomes: list[Outcome], reference: Outcome) -> None:
        for outcome in outcomes:
            check_digest(outcome, reference)


def check_initial_weights(outcome: Outcome, reference: Outcome) -> None:
    """Same seed, same bits, whatever the sharding."""
    assert outcome.initial_digest == reference.initial_digest


def check_follows_the_oracle(outcome: Outcome) -> None:
    """Global-mean gradient, global clipping, AdamW and the learning rate given, over accumulation and ranks."""
    oracle = Oracle(OPTIMIZER, SEED)
    for step, found in enumerate(outcome.curve):
        loss, norm = oracle.step(_ids(step), rate(step))
        where = f"step {step} of {outcome.strategy} on {outcome.ranks} ranks"
        assert found["loss"] == pytest.approx(loss, rel=TIGHT), where
        assert found["grad_norm"] == pytest.approx(norm, rel=TIGHT), where
        assert found["applied"] == 1, where


def check_state_follows_the_oracle(outcome: Outcome) -> None:
    """Every parameter and moment is in the checkpoint, once, with the value that it should have."""
    oracle = Oracle(OPTIMIZER, SEED)
    for step in range(SECOND):
        oracle.step(_ids(step), rate(step))
    wanted = {"param": oracle.params, "adamw.m": oracle.m, "adamw.v": oracle.v}
    state = read_state(outcome.checkpoints["second"])
    assert sorted(pair for pair in state if pair[0] in STATE_KINDS) == sorted(
        (kind, name) for kind in STATE_KINDS for name in SHAPES
    )
    for kind, values in wanted.items():
        for name, value in values.items():
            found = state[kind, name]
            assert found.shape == value.shape
            scale = float(np.abs(value).max())
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4 * scale, err_msg=f"{kind} {name}")
    steps = {float(value) for (kind, _), value in state.items() if kind == "adamw.step"}
    assert steps == {float(SECOND)}


def check_resume_is_exact(outcome: Outcome) -> None:
    """A fresh engine with a loaded state gives the very same losses and norms."""
    assert outcome.again == outcome.curve[FIRST:SECOND]


def check_foreign_checkpoint_is_kept(outcome: Outcome, reference: Outcome) -> None:
    """What `single` saved, loaded here and saved again, is bit for bit the same."""
    there, here = read_state(reference.checkpoints["first"]), read_state(outcome.checkpoints["copied"])
    assert sorted(there) == sorted(here)
    for pair, value in there.items():
        assert value.dtype == here[pair].dtype
        assert value.tobytes() == here[pair].tobytes(), pair


def check_foreign_run_continues(outcome: Outcome, reference: Outcome) -> None:
    """The run that `single` began goes on here as it went on there."""
    for here, there in zip(outcome.continued, reference.curve[FIRST:SECOND], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=TIGHT)


def check_non_finite_is_skipped(outcome: Outcome) -> None:
    """The update is reported as not applied, the state keeps every bit, and the next sound step is applied."""
    assert outcome.poisoned["applied"] == 0
    assert not math.isfinite(outcome.poisoned["grad_norm"])
    before, after = read_state(outcome.checkpoints["second"]), read_state(outcome.checkpoints["poisoned"])
    for pair, value in before.items():
        assert value.tobytes() == after[pair].tobytes(), pair
    assert outcome.after["applied"] == 1
    assert math.isfinite(outcome.after["loss"])


def check_evaluation(outcome: Outcome) -> None:
    """(sum, weight) over all rows, although the last batch is short."""
    oracle = Oracle(OPTIMIZER, SEED)
    for step in range(FIRST):
        oracle.step(_ids(step), rate(step))
    total, weight = oracle.evaluate(np.arange(NUM_ROWS))
    assert outcome.evaluation["loss"] == pytest.approx([total, weight], rel=TIGHT)
    assert outcome.evaluation["counted"][1] == NUM_ROWS


def check_call(outcome: Outcome, reference: Outcome) -> None:
    """`call` runs the current model, not in training mode."""
    assert outcome.called == pytest.approx(reference.called, rel=1e-4)
    assert not outcome.training_in_call


def check_digest(outcome: Outcome, reference: Outcome) -> None:
    """A loaded state has the digest that its bits have, however it is sharded."""
    expected = {
        name: box_digest(value, value.shape, (0,) * value.ndim)
        for (kind, name), value in read_state(reference.checkpoints["first"]).items()
        if kind in ("param", "buffer")
    }
    assert outcome.copied_digest == expected


def read_state(folder: str) -> dict[tuple[str, str], Any]:
    """All tensors of a checkpoint whole, as numpy arrays, by (kind, name). Proves coverage and checksums."""
    reader = CheckpointReader(folder).role("model")
    return {
        (kind, name): reader.read(kind, name, (0,) * len(info.shape), tuple(info.shape))
        for (kind, name), info in reader.tensors.items()
    }


def _ids(step: int) -> Any:
    return sample_ids(SEED, step, GLOBAL_BATCH, NUM_ROWS)
