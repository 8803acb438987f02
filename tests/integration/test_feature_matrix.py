"""Every feature on every strategy: two ranks learn what one process learns, or are refused with what to use instead."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from unitrain import registry
from unitrain.checkpoint import CheckpointReader
from unitrain.errors import ExitCode, MissingExtra
from unitrain.run import Run

sys.path.insert(0, str(Path(__file__).parent))
from feature_matrix import RECIPE, STEPS
from features import FEATURES, REFUSED, Refusal, runnable, strategies
from forked import Found, Shape, run_shapes
from runs import checkpoints, unitrain

pytestmark = pytest.mark.timeout(1800)  # the first test pays for all
FASTER = ("peft", "transformers.models.llama.modeling_llama")  # what ranks would import one after the other
FEATURES_TORCH = Path(__file__).with_name("features_torch.py")
MEASURED = {"seconds", "samples_per_second", "tokens_per_second", "memory_bytes"}
STATE_REL = 1e-4  # of a tensor's norm, after all steps


class Matrix(NamedTuple):
    """What the ranks of each shape said, and the folder of their runs."""

    folder: Path
    found: Found

    def run(self, shape: Shape, name: str) -> Path:
        """A run's folder."""
        return self.folder / str(shape) / name

    def outcomes(self, shape: Shape, name: str) -> list[dict[str, Any]]:
        """What each rank said of a run."""
        ranks = self.found[shape]
        assert not isinstance(ranks, str), ranks
        for rank in ranks:
            failures = [f"{other}: {said['failed']}" for other, said in rank.items() if "failed" in said]
            assert name in rank and "failed" not in rank[name], failures
        return [rank[name] for rank in ranks]


def shape_of(strategy: str) -> Shape:
    return Shape(strategy, 1 if strategy == "single" else 2)


def why_not(strategy: str) -> str:
    """Which package a strategy lacks here; empty where none."""
    try:
        registry.entry("strategies", strategy)
    except MissingExtra as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """All features on all strategies, each strategy by one group of processes."""
    folder = tmp_path_factory.mktemp("features")
    shapes = [shape_of(name) for name in ("single", *strategies()) if not why_not(name)]
    preload = FASTER if "lora" in runnable() else ()
    return Matrix(folder / "train", run_shapes("feature_matrix:part", folder, "train", shapes, preload=preload))


@pytest.mark.parametrize("strategy", ["single", *strategies()])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_honoured_or_refused_with_an_alternative(matrix: Matrix, feature: str, strategy: str) -> None:
    if (reason := why_not(strategy)) or feature not in runnable():
        pytest.skip(reason or f"needs {', '.join(FEATURES[feature].requires)}")
    shape, refusal = shape_of(strategy), REFUSED.get((feature, strategy))
    outcomes = matrix.outcomes(shape, feature)
    if refusal is None:
        assert outcomes == [{"seconds": said["seconds"]} for said in outcomes], "it is refused, and the table is silent"
        check_honoured(matrix, shape, feature, feature)
        return
    for said in outcomes:
        assert "refused" in said, "it is honoured, and the table says that it is refused"
        assert said["kind"] in ("Refused", "UserError")
        assert said["step"] == 0
        assert refusal.says in said["refused"]
    if refusal.options:
        matrix.outcomes(shape, f"{feature}-as-told")
        check_honoured(matrix, shape, f"{feature}-as-told", feature)


@pytest.mark.parametrize(("feature", "strategy"), REFUSED)
def test_every_alternative_is_honoured(feature: str, strategy: str) -> None:
    refusal = REFUSED[feature, strategy]
    others = named(refusal)
    assert others or refusal.options or refusal.feature
    for other in others:
        instead = REFUSED.get((feature, other))
        assert other in registry.STRATEGIES and (instead is None or instead.options), other
    if refusal.feature:
        assert (refusal.feature, strategy) not in REFUSED


def test_the_table_names_features_and_strategies_that_there_are() -> None:
    assert {feature for feature, _ in REFUSED} <= set(FEATURES)
    assert {strategy for _, strategy in REFUSED} <= set(strategies())


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_rank_that_alone_leaves_a_parameter_out_ends_the_run_and_says_why(tmp_path: Path, strategy: str) -> None:
    if reason := why_not(strategy):
        pytest.skip(reason)
    text = RECIPE.replace("STRATEGY", strategy).replace("feature_matrix:none", f"{FEATURES_TORCH}:RareAtOnce")
    (tmp_path / "recipe.yaml").write_text(text)
    done = unitrain("launch", "recipe.yaml", "--nproc", "2", cwd=tmp_path, PYTHONPATH=str(FEATURES_TORCH.parent))
    assert done.code == ExitCode.BAD_RECIPE
    assert "'rare." in done.last_line and REFUSED["rare", strategy].says in done.last_line


def named(refusal: Refusal) -> list[str]:
    """The strategies that a refusal names."""
    return [
        name
        for names in re.findall(r"--strategy (\w+(?:, (?!or )\w+)*(?: or \w+)?)", refusal.says)
        for name in re.split(r", | or ", names)
    ]


def check_honoured(matrix: Matrix, shape: Shape, name: str, feature: str) -> None:
    """A run is that of one process, and resumed from its middle it is the same to the last bit."""
    wanted, ours = FEATURES[feature], matrix.run(shape, name)
    theirs, again = matrix.run(shape_of("single"), feature), matrix.run(shape, f"{name}-again")
    assert records(again, "train") == records(ours, "train")
    resumed = state(again)
    for key, value in state(ours).items():
        assert resumed[key].tobytes() == value.tobytes(), key

    for split, rel in (("train", wanted.rel), ("eval", max(wanted.rel, wanted.evaluation_rel))):
        for mine, other in zip(records(ours, split), records(theirs, split), strict=True):
            assert_near(mine.pop("loss"), other.pop("loss"), rel)
            assert_near(mine, other, 10 * rel)  # norms and further metrics
    assert len(records(ours, "train")) == STEPS
    if wanted.unlike:
        assert losses(ours) != losses(matrix.run(shape, wanted.unlike)), "the feature has no effect"
    check_state(state(ours), state(theirs), max(STATE_REL, wanted.rel), max(STATE_REL, wanted.evaluation_rel))
    if (noted := ours / "noted.json").exists():
        assert_near(json.loads(noted.read_text()), json.loads((theirs / "noted.json").read_text()), 10 * wanted.rel)


def check_state(ours: dict[Any, Any], theirs: dict[Any, Any], rel: float, buffer_rel: float) -> None:
    """Checkpoints hold the same tensors, near each other."""
    assert sorted(ours) == sorted(theirs)
    for (role, kind, name), value in theirs.items():
        mine = ours[role, kind, name]
        assert (mine.shape, mine.dtype) == (value.shape, value.dtype), (role, kind, name)
        apart = np.linalg.norm((mine.astype(float) - value.astype(float)).ravel())
        limit = (buffer_rel if kind == "buffer" else rel) * np.linalg.norm(value.astype(float).ravel())
        assert apart <= limit + 1e-7, (role, kind, name, apart, limit)


def records(run: Path, split: str) -> list[dict[str, Any]]:
    """What a run recorded of its steps or evaluations, without what a clock says."""
    return [
        {key: value for key, value in record.items() if key not in MEASURED}
        for record in Run(run).metrics()
        if record["split"] == split
    ]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run, "train")]


def state(run: Path) -> dict[tuple[str, str, str], Any]:
    """All tensors of a run's last checkpoint, by role, kind and name."""
    reader = CheckpointReader(str(checkpoints(run)[-1]))
    return {
        (role, kind, name): reader.role(role).read(kind, name, (0,) * len(info.shape), tuple(info.shape))
        for role in reader.roles
        for (kind, name), info in reader.role(role).tensors.items()
    }


def assert_near(ours: Any, theirs: Any, rel: float) -> None:
    """JSON values whose numbers are near each other; a null is a number that is not finite."""
    mine, others = list(leaves(ours)), list(leaves(theirs))
    assert [path for path, _ in mine] == [path for path, _ in others]
    for (path, value), (_, other) in zip(mine, others, strict=True):
        numbers = isinstance(value, int | float) and isinstance(other, int | float)
        assert (value == pytest.approx(other, rel=rel, abs=1e-7)) if numbers else (value == other), path


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What a JSON value holds, by its place."""
    if isinstance(value, dict | list):
        for key, item in sorted(value.items()) if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, value
