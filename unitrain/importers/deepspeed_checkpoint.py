"""A DeepSpeed checkpoint's weights as safetensors. Its pickles are opened in a process of their own, as data only.

The fp32 masters are taken where they were saved, else the weights as they were computed with. Moments are not: a run
that starts from these weights starts its optimizer anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UserError

WEIGHTS = "model.safetensors"
CHILD = "unitrain.importers.pickled_torch"
TIMEOUT_SECONDS = 3600
_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)")


@dataclass(frozen=True, kw_only=True)
class ImportedWeights:
    """What was found and written."""

    folder: str  # of the checkpoint, with its tag
    stage: int  # of ZeRO; 0: no partitions were saved
    ranks: int  # that wrote it
    masters: bool  # True: fp32 masters; False: the weights of forward passes, in their own dtype
    tensors: int
    elements: int
    shared: dict[str, str]  # name -> the name under which its values were written


def import_deepspeed_checkpoint(folder: str | Path, out: str | Path) -> ImportedWeights:
    """Write `out`/model.safetensors from the folder that `save_checkpoint` was given, or from one of its tags.

    Raises UserError for a folder that is no such checkpoint, or an `out` that holds weights already; CheckpointError
    where a file cannot be read as plain tensors.
    """
    tagged = _tagged(Path(folder))
    out = Path(out)
    target = out / WEIGHTS
    if target.exists():
        raise UserError(f"{target} exists; import into another folder")
    task = {"models": _files(tagged, "model_states.pt"), "partitions": _files(tagged, "optim_states.pt")}
    if not task["models"]:
        raise UserError(f"{tagged} holds no *_model_states.pt; give the folder that DeepSpeed's save_checkpoint wrote")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".importing-", dir=out) as scratch:
        written = Path(scratch) / WEIGHTS
        facts = _run_child({**task, "out": str(written)}, tagged)
        os.replace(written, target)
    return ImportedWeights(folder=str(tagged), **facts)


def _tagged(folder: Path) -> Path:
    """The folder of one step: the one named in `latest`, or the one given."""
    latest = folder / "latest"
    if not latest.is_file():
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give the one that DeepSpeed's save_checkpoint wrote")
        return folder
    tag = latest.read_text(encoding="utf-8").strip()
    if not tag or Path(tag).name != tag or tag in (".", ".."):
        raise UserError(f"{latest} names {tag[:80]!r}, which is no folder beside it; give the folder of a step itself")
    return folder / tag


def _files(folder: Path, ending: str) -> list[str]:
    """Files of that ending by the number of their rank. Raises UserError for a model cut over several ranks."""
    found = []
    for path in folder.glob(f"*_{ending}") if folder.is_dir() else ():
        rank = _RANK.match(path.name)
        if (rank and int(rank[2])) or re.match(r"(?:mp_rank_(?!00)|layer_|.*expert)", path.name):
            raise UserError(f"{path} is of a model cut by tensor, pipeline or expert parallelism, and is not imported")
        found.append((int(rank[1]) if rank else 0, str(path.absolute())))
    return [path for _, path in sorted(found)]


def _run_child(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the child says of its work. It gets no variable of this process but where its modules are."""
    done = subprocess.run(
        [sys.executable, "-m", CHILD, json.dumps(task)],
        env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"the process ended with {done.returncode}"
        raise CheckpointError(f"{folder} could not be imported: {reason}")
    facts: dict[str, Any] = json.loads(done.stdout.rpartition("\n")[2] or done.stdout)
    return facts
