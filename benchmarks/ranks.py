"""Ranks of a benchmark, started by our own agent: each writes what it measured, and all of it comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unitrain import registry

HERE = Path(__file__).parent
CASE = "case.json"


def run_ranks(
    entry: str, case: Mapping[str, Any], *, strategy: str, ranks: int, timeout_seconds: float, **environ: str
) -> list[dict[str, Any]]:
    """What each rank handed to `write_found`, by rank.

    `entry`, module:function of this folder, gets the run's folder, in which `case` lies as JSON. Raises SystemExit with
    what the agent said where a rank fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        known = registry.entry("strategies", strategy)
        job = {
            "run_id": f"{strategy}-{ranks}",
            "launcher": "local",
            "nodes": 1,
            "nproc": ranks,
            "preload": list(known.preload),
            "fork": known.fork,
            "options": {"entry": entry},
        }
        (folder / "job.json").write_text(json.dumps(job))
        (folder / CASE).write_text(json.dumps(case))
        done = subprocess.run(
            [sys.executable, "-m", "unitrain.agent", str(folder)],
            cwd=HERE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{strategy} on {ranks} ranks failed:\n{done.stderr}")
        return [json.loads(_file(folder, rank).read_text()) for rank in range(ranks)]


def read_case(folder: Path) -> dict[str, Any]:
    """In a rank: the case that it is to measure."""
    case: dict[str, Any] = json.loads((folder / CASE).read_text())
    return case


def write_found(folder: Path, rank: int, found: Mapping[str, Any]) -> None:
    """In a rank: hand back what it measured."""
    _file(folder, rank).write_text(json.dumps(found))


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"
