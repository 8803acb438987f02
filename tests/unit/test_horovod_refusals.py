"""What strategy `horovod` refuses before launch."""

from __future__ import annotations

import pytest

from unitrain.recipe import Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategies import _torch_refusals
from unitrain.strategy import Cluster

pytestmark = pytest.mark.fast


def refusals(ranks: int = 2, precision: str = "fp32", **options: object) -> list[str]:
    train = TrainRecipe(precision=precision)
    recipe = Recipe(trainer="a:b", train=train, strategy=StrategyRecipe(name="horovod", options=options))
    found = _torch_refusals.horovod(recipe, Cluster(nodes=1, nproc=ranks))
    return [f"{problem.what}; {problem.instead}" for problem in found]


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a rank of mpirun, with a Horovod that has MPI."""
    monkeypatch.setattr(_torch_refusals, "horovod_has_mpi", lambda: True)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")


def test_all_its_options_together_are_accepted(mpi: None) -> None:
    options = {"compression": "fp16", "adasum": True, "backend": "mpi", "cycle_time_ms": 0.5, "fusion_threshold_mb": 0}
    assert refusals(4, **options, compile=True, activation_checkpointing=True) == []


def test_an_unknown_option_is_refused_with_the_nearest_known_one() -> None:
    (refusal,) = refusals(compresion="fp16")
    assert "strategy 'horovod' has no option 'compresion', did you mean 'compression'?" in refusal


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("compression", "bf16", "use one of none, fp16"),
        ("backend", "nccl", "use one of gloo, mpi"),
        ("adasum", "yes", "use one of true, false"),
        ("cycle_time_ms", 0, "use a number, 0.1 or more"),
        ("fusion_threshold_mb", True, "use a number, 0 or more"),
        ("fusion_threshold_mb", "big", "use a number, 0 or more"),
    ],
)
def test_a_value_that_it_cannot_use_is_refused(option: str, value: object, instead: str) -> None:
    assert f"strategy.options.{option} is {value!r}; {instead}" in refusals(**{option: value})


def test_mpi_is_refused_where_the_build_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch_refusals, "horovod_has_mpi", lambda: False)
    (refusal,) = refusals(backend="mpi")
    assert refusal == (
        "this Horovod was built without MPI; python -m unitrain.build horovod --mpi, or leave "
        "strategy.options.backend out"
    )


def test_mpi_ranks_are_refused_to_launchers_that_are_not_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch_refusals, "horovod_has_mpi", lambda: True)
    (refusal,) = refusals(backend="mpi")
    assert "only MPI can start the ranks; use --launcher mpi" in refusal
    assert refusals(1, backend="mpi") == []


def test_adasum_is_refused_over_gloo() -> None:
    (refusal,) = refusals(adasum=True)
    assert refusal == (
        "Horovod has Adasum over MPI only; set strategy.options.backend=mpi (python -m unitrain.build horovod --mpi)"
    )


def test_adasum_is_refused_on_three_ranks(mpi: None) -> None:
    (refusal,) = refusals(3, adasum=True, backend="mpi")
    assert refusal.startswith("Adasum combines ranks in pairs, and 3 is no power of two; use 2, 4, 8, ... ranks")


def test_gradients_are_not_compressed_to_what_their_loss_scale_overflows() -> None:
    (refusal,) = refusals(precision="fp16", compression="fp16")
    assert refusal.endswith("use train.precision=bf16, or leave compression out")
