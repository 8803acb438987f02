"""A failed step once more, in one process: from the capsule of a failure to the same exception, or not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from . import registry
from .capsule import FILE
from .checkpoint import CheckpointReader
from .errors import CheckpointError, UserError, type_name
from .keras_backend import settle_keras
from .recipe_file import load_recipe
from .redaction import redacted
from .trainer import Replay, Trainer
from .trainer_path import resolve_trainer
from .world import World, environment

_FACTS: dict[str, Any] = {
    **{
        "step": int,
        "exception": dict,
        "recipe": str,
        "checkpoint": str,
        "skipped": list,
        "rollbacks": int,
        "error": str,
    }
}


class Reproduction(NamedTuple):
    """Whether the same exception came, and what to say of it."""

    same: bool
    words: str


def reproduce(folder: Path, strategy: str = "single") -> Reproduction:
    """Train from the capsule's checkpoint, or the beginning, through its step. Keeps nothing.

    Raises UserError for a folder that holds no capsule.
    """
    capsule = _read(folder)
    step, wanted = capsule.get("step"), capsule.get("exception")
    if not isinstance(step, int):
        raise UserError(f"{folder} does not tell the step of its failure: there is nothing to repeat")
    with tempfile.TemporaryDirectory(prefix="unitrain-repro-") as scratch:
        trainer = _trainer(capsule, folder, strategy, Path(scratch))
        checkpoint = _sound(capsule.get("checkpoint"))
        began = "the beginning" if checkpoint is None else checkpoint
        print(f"replaying step {step} on {strategy}, from {began}", flush=True)
        plan = Replay(
            checkpoint=checkpoint,
            skipped=tuple((begin, end) for begin, end in capsule.get("skipped") or []),
            rollbacks=capsule.get("rollbacks") or 0,
        )
        try:
            for done in trainer.repeat_steps(plan):
                if done > step:
                    break
        except Exception as error:  # whatever the user's code raises
            return _compared(error, trainer, wanted, step)
    recorded = f"{wanted['type']}: {wanted['message']}" if wanted else capsule.get("error") or "nothing is recorded"
    return Reproduction(False, f"not reproduced: step {step} went through in one process; recorded is {recorded}")


def _compared(error: Exception, trainer: Trainer, wanted: dict[str, str] | None, step: int) -> Reproduction:
    found = f"{type_name(type(error))}: {error}"
    at = trainer.failure_account()["step"]
    if wanted is None:
        return Reproduction(False, f"not reproduced: no exception was recorded, and step {at} raised {found}")
    message = redacted(str(error), environment())
    if (type_name(type(error)), message) == (wanted["type"], wanted["message"]) and at == step:
        return Reproduction(True, f"reproduced: step {at} raised {found}")
    return Reproduction(
        False,
        f"not reproduced: step {at} raised {found}, recorded is step {step}, {wanted['type']}: {wanted['message']}",
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder if folder.name == FILE else folder / FILE
    try:
        capsule = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} holds no {FILE}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if odd := _odd(capsule):
        raise UserError(f"{path} is no capsule: {odd} is not what a run writes")
    found: dict[str, Any] = capsule
    return found


def _odd(capsule: Any) -> str | None:
    """What of the capsule no run has written, if anything is."""
    if not isinstance(capsule, dict):
        return "it"
    for name, kind in _FACTS.items():
        if not isinstance(capsule.get(name), kind | None):
            return f"its {name}"
    windows, exception = capsule.get("skipped") or [], capsule.get("exception")
    if not all(isinstance(window, list) and [type(end) for end in window] == [int, int] for window in windows):
        return "its skipped"
    if exception is not None and not all(isinstance(exception.get(name), str) for name in ("type", "message")):
        return "its exception"
    return None


def _trainer(capsule: dict[str, Any], folder: Path, strategy: str, scratch: Path) -> Trainer:
    text, run_dir = capsule.get("recipe") or "", folder.resolve().parent.parent
    recipe_file = scratch / "recipe.yaml"
    if text and "[redacted" not in text:
        recipe_file.write_text(text, encoding="utf-8")
    else:
        recipe_file = run_dir / "recipe.yaml"
    recipe = load_recipe(
        recipe_file,
        ["launcher={name: local, nproc: 1}", "checkpoint.path=null", "checkpoint.memory_every=null"],
        strategy=strategy,
    )
    settle_keras(registry.framework_of(recipe.strategy))
    registry.prepare(recipe.strategy.name)
    return resolve_trainer(recipe.trainer, beside=run_dir)(recipe, run_dir=scratch / "run", world=World())


def _sound(folder: str | None) -> str | None:
    """The checkpoint, where it is still there and whole."""
    if folder is None:
        return None
    try:
        CheckpointReader(folder).verify()
    except CheckpointError as error:
        print(f"note: {folder} cannot be used any more: {error}", flush=True)
        return None
    return folder
