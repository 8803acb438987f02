"""Importing a DeepSpeed checkpoint: partitions become whole tensors, and a pickle that would run code ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from unitrain.errors import CheckpointError, UserError
from unitrain.importers.deepspeed_checkpoint import import_deepspeed_checkpoint
from unitrain.importers.pickled_torch import cut, unflatten


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def written(folder: Path, models: dict[str, Any], states: list[dict[str, Any]]) -> Path:
    """A checkpoint folder as DeepSpeed lays it out."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    torch.save(models, step / "mp_rank_00_model_states.pt")
    for rank, state in enumerate(states):
        torch.save({"optimizer_state_dict": state}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def model(**others: Any) -> dict[str, Any]:
    """Two parameters of one group, and a buffer."""
    shapes = {"weight": torch.Size((3, 5)), "bias": torch.Size((4,))}
    module = {name: torch.zeros(tuple(shape), dtype=torch.bfloat16) for name, shape in shapes.items()}
    return {"module": {**module, "mean": torch.ones(2)}, "param_shapes": [shapes], "buffer_names": ["mean"], **others}


def test_partitions_of_two_ranks_become_whole_fp32_tensors(tmp_path: Path) -> None:
    flat = torch.arange(20.0)  # 19 elements and one of padding
    states = [
        {"zero_stage": 2, "partition_count": [2], "single_partition_of_fp32_groups": [part]} for part in flat.split(10)
    ]
    found = import_deepspeed_checkpoint(written(tmp_path / "from", model(), states), tmp_path / "to")
    tensors = load_file(tmp_path / "to" / "model.safetensors")
    assert (found.stage, found.ranks, found.masters, found.tensors, found.elements) == (2, 2, True, 3, 21)
    assert np.array_equal(tensors["weight"], np.arange(15.0, dtype=np.float32).reshape(3, 5))
    assert np.array_equal(tensors["bias"], np.arange(15.0, 19.0, dtype=np.float32))
    assert np.array_equal(tensors["mean"], np.ones(2, np.float32))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("EVIL_FOLDER", str(trap))
    folder = written(tmp_path / "from", model(client=Evil()), [])
    with pytest.raises(CheckpointError, match="could not be imported"):
        import_deepspeed_checkpoint(folder, tmp_path / "to")
    assert not trap.exists()
    assert list((tmp_path / "to").iterdir()) == []


def test_a_missing_rank_is_told(tmp_path: Path) -> None:
    state = {"zero_stage": 1, "partition_count": 2, "single_partition_of_fp32_groups": [torch.zeros(10)]}
    with pytest.raises(CheckpointError, match="2 ranks wrote the checkpoint, and there are files of 1"):
        import_deepspeed_checkpoint(written(tmp_path / "from", model(), [state]), tmp_path / "to")


def test_other_folders_and_full_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \*_model_states.pt"):
        import_deepspeed_checkpoint(tmp_path, tmp_path / "to")
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(UserError, match="which is no folder beside it"):
        import_deepspeed_checkpoint(tmp_path, tmp_path / "to")
    full = tmp_path / "full"
    full.mkdir()
    (full / "model.safetensors").touch()
    with pytest.raises(UserError, match="exists; import into another folder"):
        import_deepspeed_checkpoint(written(tmp_path / "from", model(), []), full)


@pytest.mark.fast
def test_flat_tensors_are_cut_as_deepspeed_lays_them() -> None:
    whole = torch.arange(10.0)
    assert unflatten(whole, {"a": (2, 2), "b": (3,)}, [2, 0])["b"].tolist() == [6, 7, 8]
    with pytest.raises(ValueError, match="b needs 11 elements, and the partitions hold 10"):
        unflatten(whole, {"a": (8,), "b": (3,)}, None)
    ranks = [torch.tensor([0.0, 1, 10]), torch.tensor([2.0, -1, 11])]  # intervals of 2 and 1; -1 is padding
    assert {name: found.tolist() for name, found in cut(ranks, {"a": (3,), "b": (2,)}).items()} == {
        "a": [0, 1, 2],
        "b": [10, 11],
    }


def test_the_reader_imports_nothing_of_deepspeed() -> None:
    code = (
        "import sys, unitrain.importers.pickled_torch; assert not any(m.startswith('deepspeed') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
