"""What the strategy `tensorflow` refuses before a launch, and what it sets before TensorFlow is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from unitrain import registry
from unitrain.recipe import Recipe, StrategyRecipe, TrainRecipe
from unitrain.strategies import _tensorflow_refusals
from unitrain.strategy import Cluster

pytestmark = pytest.mark.fast


def refusals(precision: str = "fp32", **options: Any) -> list[str]:
    recipe = Recipe(
        trainer="a:B",
        train=TrainRecipe(precision=precision),
        strategy=StrategyRecipe(name="tensorflow", options=options),
    )
    problems = _tensorflow_refusals.tensorflow(recipe, Cluster(nodes=1, nproc=2))
    return [f"{problem.what}: {problem.instead}" for problem in problems]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"comunication": "ring"},
            "has no option 'comunication', did you mean 'communication'?: known: ",
        ),
        ({"communication": "gloo"}, "communication is 'gloo': use one of auto, ring, nccl"),
        ({"jit_compile": "yes"}, "jit_compile is 'yes': use one of false, true"),
        ({"jit_compile": 1}, "jit_compile is 1: use one of false, true"),
        ({"precision": "fp16"}, "no train.precision=fp16: it scales no losses: use train.precision=bf16"),
    ],
)
def test_what_it_cannot_do_is_refused_with_an_alternative(options: dict[str, Any], said: str) -> None:
    (found,) = refusals(**options)
    assert said in found


def test_what_it_can_do_is_not_refused() -> None:
    assert refusals() == []
    assert refusals("bf16", communication="nccl", jit_compile=True) == []


def test_asking_imports_no_framework_and_preparing_sets_what_the_user_has_not() -> None:
    code = """
import json, os, sys
from unitrain import registry
registry.resolve(registry.entry("strategies", "tensorflow").problems)
registry.prepare("tensorflow")
names = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS", "KERAS_BACKEND")
print(json.dumps([[name for name in ("tensorflow", "keras") if name in sys.modules], [os.environ[n] for n in names]]))
"""
    if not registry.STRATEGIES["tensorflow"].installed:
        pytest.skip("TensorFlow is not installed")
    environ = ["env", "TF_CPP_MIN_LOG_LEVEL=1", "KERAS_BACKEND=jax"]
    done = subprocess.run([*environ, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], ["1", "0", "tensorflow"]]
