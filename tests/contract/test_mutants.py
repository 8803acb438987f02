"""The conformance suite fails for strategies that break the contract: it can tell right from wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from unitrain.registry import STRATEGIES
from unitrain.testing import contract
from unitrain.testing.scenario import Outcome, run_scenario

MUTANTS: dict[str, Callable[[Outcome, Outcome], None]] = {
    "NoGradientSync": lambda outcome, _: contract.check_follows_the_oracle(outcome),
    "MeanOfMeans": lambda outcome, _: contract.check_follows_the_oracle(outcome),
    "PerRankClip": lambda outcome, _: contract.check_follows_the_oracle(outcome),
    "RateByWorldSize": lambda outcome, _: contract.check_follows_the_oracle(outcome),
    "LostSlot": lambda outcome, _: contract.check_state_follows_the_oracle(outcome),
    "AppliesTheNonFinite": lambda outcome, _: contract.check_non_finite_is_skipped(outcome),
    "DigestOfOwnShard": contract.check_digest,
}
PRELOAD = STRATEGIES["ddp"].preload


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_scenario(tmp_path_factory.mktemp("reference") / "single", "single", 1)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_seeded_mutant_is_caught(
    mutant: str, reference: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    outcome = run_scenario(
        tmp_path / mutant, f"mutants:{mutant}", 2, load_from=reference.checkpoints["first"], preload=PRELOAD
    )
    with pytest.raises(AssertionError):
        MUTANTS[mutant](outcome, reference)


def test_the_same_run_without_a_mutation_passes_every_check(tmp_path: Path, reference: Outcome) -> None:
    outcome = run_scenario(tmp_path / "sound", "ddp", 2, load_from=reference.checkpoints["first"])
    for check in MUTANTS.values():
        check(outcome, reference)
