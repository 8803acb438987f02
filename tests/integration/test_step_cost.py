"""A Trainer's step asks for no more than a tuned loop by hand: counts, which no other load on the machine can move."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MOST_EXTRA_CALLS = 30  # Lightning Fabric adds some 125, Accelerate some 520


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What the benchmark counted, by (strategy, loop)."""
    report = tmp_path_factory.mktemp("step") / "counts.json"
    command = [sys.executable, str(BENCHMARKS / "step.py"), "--counts-only", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert report.exists(), done.stderr
    return {(row["strategy"], row["loop"]): row for row in json.loads(report.read_text())["rows"]}


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_a_step_costs_no_more_than_one_by_hand_and_gives_the_same_bits(rows, strategy):
    ours, by_hand = rows[strategy, "unitrain"], rows[strategy, "by hand"]
    assert ours["bit_equal"], "another computation is no comparison"
    assert ours["counts"]["calls"] - by_hand["counts"]["calls"] <= MOST_EXTRA_CALLS
    assert ours["counts"]["collectives"] == by_hand["counts"]["collectives"]
    assert ours["counts"]["host_syncs"] == 0
    assert bool(ours["counts"]["collectives"]) == (strategy != "single"), "the counting sees collectives"


def test_the_counts_see_what_a_step_must_not_do():
    import torch
    import torch.distributed as dist

    spec = importlib.util.spec_from_file_location("counts", BENCHMARKS / "counts.py")
    assert spec is not None and spec.loader is not None
    counts = importlib.util.module_from_spec(spec)
    sys.modules["counts"] = counts  # dataclasses look their module up
    spec.loader.exec_module(counts)
    value = torch.ones(2)

    def wasteful(steps: int) -> None:
        for _ in range(steps):
            dist.all_reduce(value)
            if value.sum() > 0:
                value.tolist()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = counts.count_step(wasteful)
    finally:
        dist.destroy_process_group()
        del sys.modules["counts"]
    assert found.collectives == {"allreduce_": 1}
    assert found.host_syncs == 2
    assert found.calls > 3
