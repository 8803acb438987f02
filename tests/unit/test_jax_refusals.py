"""What strategy `jax` refuses before launch."""

from __future__ import annotations

import pytest

from unitrain.recipe import Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategies import _jax_refusals
from unitrain.strategy import Cluster

pytestmark = pytest.mark.fast


def refusals(ranks: int = 2, precision: str = "fp32", **options: object) -> list[str]:
    train = TrainRecipe(precision=precision)
    recipe = Recipe(trainer="a:b", train=train, strategy=StrategyRecipe(name="jax", options=options))
    found = _jax_refusals.jax(recipe, Cluster(nodes=1, nproc=ranks))
    return [f"{problem.what}; {problem.instead}" for problem in found]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {}),
        (3, {}),
        (2, {"fsdp": 2}),
        (2, {"data": 1, "fsdp": 2, "tensor": 1, "remat": True}),
        (4, {"fsdp": 2, "tensor": 2}),
        (2, {"local_devices": 4, "fsdp": 2, "tensor": 2}),
        (4, {"local_devices": 2, "tensor": 4}),
    ],
)
def test_a_mesh_of_all_devices_is_accepted(ranks: int, options: dict[str, object]) -> None:
    assert refusals(ranks, "bf16", **options) == []


def test_an_unknown_option_is_refused_with_the_nearest_known_one() -> None:
    (refusal,) = refusals(fsdb=2)
    assert refusal == (
        "strategy 'jax' has no option 'fsdb', did you mean 'fsdp'?; known: data, fsdp, tensor, local_devices, remat"
    )


@pytest.mark.parametrize(
    ("ranks", "options", "refusal"),
    [
        (
            2,
            {"data": 2, "fsdp": 2},
            "a mesh of data=2, fsdp=2, tensor=1 has 4 devices, and there are 2 devices (2 ranks of 1); "
            "use data=1,fsdp=2, or 4 ranks of one device",
        ),
        (
            3,
            {"fsdp": 2},
            "a mesh of data=1, fsdp=2, tensor=1 has 2 devices, and there are 3 devices (3 ranks of 1); "
            "use data=3, or 2 ranks of one device",
        ),
        (
            3,
            {"local_devices": 2, "tensor": 3},
            "strategy.options.tensor=3 would cut the 2 devices of a rank across two groups; "
            "use a divisor or a multiple of 2, or another local_devices",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_one_that_does(
    ranks: int, options: dict[str, object], refusal: str
) -> None:
    assert refusals(ranks, **options) == [refusal]


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("fsdp", 0, "use a whole number, 1 or more"),
        ("tensor", "2", "use a whole number, 1 or more"),
        ("local_devices", True, "use a whole number, 1 or more"),
        ("remat", 1, "use true or false"),
    ],
)
def test_a_value_that_it_cannot_use_is_refused(option: str, value: object, instead: str) -> None:
    assert refusals(**{option: value}) == [f"strategy.options.{option} is {value!r}; {instead}"]


def test_fp16_is_refused_with_what_it_can() -> None:
    (refusal,) = refusals(precision="fp16")
    assert "no train.precision fp16; use bf16" in refusal
