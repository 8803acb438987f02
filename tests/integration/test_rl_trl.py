"""The stored numbers of TRL are what the installed TRL computes; the unit tests hold ours against them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures" / "rl"


def differences(stored: Any, found: Any, where: str = "") -> list[str]:
    """Numbers that differ by more than rounding, and places that only one of the two has."""
    match stored:
        case dict():
            parts = [*{**stored, **found}]
            return [line for key in parts for line in differences(stored.get(key), found.get(key), f"{where}/{key}")]
        case list() if isinstance(found, list) and len(found) == len(stored):
            each = enumerate(zip(stored, found, strict=True))
            return [line for number, (one, two) in each for line in differences(one, two, f"{where}/{number}")]
        case float() if isinstance(found, float):
            return [] if found == pytest.approx(stored, rel=1e-4, abs=1e-6) else [f"{where}: {stored}, now {found}"]
    return [] if stored == found else [f"{where}: {stored}, now {found}"]


def test_the_installed_trl_computes_the_stored_numbers(tmp_path: Path) -> None:
    stored = json.loads((FIXTURES / "trl.json").read_text(encoding="utf-8"))
    wanted = stored.pop("made with")["trl"]
    try:
        installed = version("trl")
    except PackageNotFoundError:
        pytest.skip(f"not run: TRL {wanted} is not installed")
    if installed != wanted:
        pytest.skip(f"not run: TRL {installed} is installed, not {wanted}")
    command = [sys.executable, str(FIXTURES / "make_trl.py"), str(tmp_path / "trl.json")]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, capture_output=True, text=True, timeout=300, env=quiet)
    assert made.returncode == 0, made.stderr[-3000:]
    found = json.loads((tmp_path / "trl.json").read_text(encoding="utf-8"))
    del found["made with"]
    assert differences(stored, found) == []


def test_differences_are_seen_wherever_they_are() -> None:
    stored = {"a": [1.0, {"b": 2.0}], "c": True, "d": [1]}
    assert differences(stored, {"a": [1.0 + 1e-9, {"b": 2.0}], "c": True, "d": [1]}) == []
    assert differences(stored, {"a": [1.0, {"b": 2.1}], "c": False, "d": [1, 2], "e": 0}) == [
        "/a/1/b: 2.0, now 2.1",
        "/c: True, now False",
        "/d: [1], now [1, 2]",
        "/e: None, now 0",
    ]
