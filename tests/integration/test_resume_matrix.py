"""A run goes on from any strategy and number of ranks to any other, with every bit of its state."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from unitrain import registry
from unitrain.checkpoint import CheckpointReader, list_checkpoints
from unitrain.errors import MissingExtra, Refused
from unitrain.recipe_file import refuse_problems
from unitrain.strategy import Cluster

sys.path.insert(0, str(Path(__file__).parent))
from forked import Shape
from resume_matrix import MORE, MOST_RANKS, chosen, recipe_of, run_shapes

pytestmark = pytest.mark.timeout(1800)  # the first test pays for all
TIGHT = 1e-5
RANKS = range(1, MOST_RANKS + 1)
KINDS = ("param", "adamw.m", "adamw.v", "adamw.step")
# Not those whose ranks run another strategy of this list: test_ray_strategy.py goes from them to others and back.
NAMES = [name for name, entry in registry.STRATEGIES.items() if not entry.inner]
SHAPES = [Shape(name, ranks) for name in NAMES for ranks in RANKS if name != "single" or ranks == 1]


def why_not(shape: Shape) -> str:
    """What keeps a shape from running here; empty where nothing does."""
    try:
        entry = registry.entry("strategies", shape.strategy)
        recipe = recipe_of(shape)
        refuse_problems(registry.resolve(entry.problems)(recipe, Cluster(nodes=1, nproc=shape.ranks)))
    except (MissingExtra, Refused) as error:
        return str(error)
    return ""


class Matrix(NamedTuple):
    """What all shapes wrote and found: per rank, or the output of a failure."""

    folder: Path
    written: dict[Shape, Any]
    resumed: dict[Shape, Any]
    everything: bool  # every pair; else those that are chosen

    def sizes(self, source: Shape) -> dict[str, int]:
        """Elements of every tensor in the checkpoint of a shape."""
        (found,) = list_checkpoints(str(self.folder / str(source))).sound
        tensors = CheckpointReader(found.folder).role("model").tensors
        return {f"{kind} {name}": math.prod(info.shape) for (kind, name), info in tensors.items()}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, full_drills: bool) -> Matrix:
    """Every shape that can run here writes, and then every shape resumes a third of them, in drills all."""
    folder = tmp_path_factory.mktemp("matrix")
    able = [shape for shape in SHAPES if not why_not(shape)]
    written = run_shapes(folder, "write", able)
    resumed = run_shapes(folder, "resume all" if full_drills else "resume", able)
    return Matrix(folder, written, resumed, full_drills)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_any_other_wrote_goes_on_here(matrix: Matrix, shape: Shape) -> None:
    if reason := why_not(shape):
        pytest.skip(reason)
    for act in (matrix.written, matrix.resumed):
        assert not isinstance(act[shape], str), act[shape]
    sources = {
        str(source): source
        for source, ranks in matrix.written.items()
        if not isinstance(ranks, str) and (matrix.everything or chosen(source, shape))
    }
    assert set(matrix.resumed[shape][0]) == set(sources)
    for name, source in sources.items():
        check_resume(matrix, shape, name, source)


def check_resume(matrix: Matrix, shape: Shape, name: str, source: Shape) -> None:
    """The state keeps every bit, and the next losses are those of the run that was never interrupted."""
    ranks = [found[name] for found in matrix.resumed[shape]]
    where = f"{name} resumed on {shape}"
    assert [found["changed"] for found in ranks] == [[]] * shape.ranks, where
    sizes = matrix.sizes(source)
    assert {tensor.partition(" ")[0] for tensor in sizes} == set(KINDS), where
    held = {tensor: sum(found["held"].get(tensor, 0) for found in ranks) for tensor in sizes}
    assert held == sizes, where
    uninterrupted = matrix.written[source][0]["losses"]
    assert len(uninterrupted) == MORE
    if source == shape:
        assert ranks[0]["losses"] == uninterrupted, where
    else:
        assert ranks[0]["losses"] == pytest.approx(uninterrupted, rel=TIGHT), where
