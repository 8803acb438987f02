"""Building DeepSpeed's operators: what a dead build left behind is removed, what a live one holds is not."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from unitrain.build import deepspeed

pytestmark = pytest.mark.fast


def test_a_lock_that_nobody_holds_is_removed_and_told(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    said: list[str] = []
    deepspeed._remove_stale_lock(tmp_path, said.append)
    assert not lock.exists()
    assert said == [f"removing {lock}, which a build that died left behind"]


def test_a_lock_that_a_build_holds_stays(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    held = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch's FileBaton does
    try:
        deepspeed._remove_stale_lock(tmp_path, lambda line: pytest.fail(line))
    finally:
        os.close(held)
    assert lock.exists()


@pytest.mark.parametrize("own", ["", "own"])
def test_an_environment_keeps_its_operators_apart_unless_told_where(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'unitrain[deepspeed]'")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / own))
    if not own:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")  # after setenv, so that what the code sets is taken back too
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", "/elsewhere")
    folder = deepspeed._folder("cpu_adam")
    assert folder.is_relative_to(tmp_path / (own or "share"))
    assert own or f"torch-{version('torch')}-deepspeed-{version('deepspeed')}" in folder.parts
    assert not deepspeed.is_built("cpu_adam")


def test_every_operator_of_a_strategy_has_its_needs_told() -> None:
    assert {"cpu_adam", "async_io"} == set(deepspeed.OPERATORS)
    assert all(operator.needs and operator.folders[-1] == name for name, operator in deepspeed.OPERATORS.items())
