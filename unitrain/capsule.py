"""A failure's own folder, RUN/failures/0001: all that is needed to look at it, send it to somebody, and see it again.

capsule.json holds step, sample ids, seed, recipe, exception, versions and environment, without secrets.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .ledger import read_ledger, well_formed
from .redaction import kept_environment, redacted

FOLDER, FILE = "failures", "capsule.json"
_PACKAGES = (
    *(
        "unitrain",
        "numpy",
        "torch",
        "jax",
        "jaxlib",
        "tensorflow",
        "tensorflow-cpu",
        "keras",
        "deepspeed",
        "horovod",
        "accelerate",
    ),
    "transformers",
)
_MOST_CAPSULES = 9999


def write_capsule(run_dir: Path, environ: Mapping[str, str], **facts: Any) -> Path:
    """Make the next numbered folder and write what is known; `account` is the Trainer's, if it could tell.

    Raises OSError where the disk does not take it.
    """
    account = dict(facts.pop("account", None) or {})
    facts = {**account, **{name: value for name, value in facts.items() if value is not None}}
    begun = _begun(run_dir)
    facts.setdefault("seed", begun.get("seed"))
    facts.setdefault("strategy", begun.get("strategy"))
    facts.setdefault("world_size", begun.get("world_size"))
    facts.setdefault("skipped", begun.get("skipped", []))
    if begun and facts.get("step") and not facts.get("sample_ids"):
        facts["sample_ids"] = _ids(begun, facts["skipped"], facts["step"])
    facts["checkpoint"] = _checkpoint_before(run_dir, facts.get("step"), facts.pop("from", None))
    facts |= {
        "time": time.time(),
        "recipe": _text(run_dir / "recipe.yaml"),
        "versions": versions(),
        "environment": kept_environment(environ),
    }
    folder = _next_folder(run_dir / FOLDER)
    beside = folder / f".{FILE}"
    beside.write_text(json.dumps(_clean(facts, environ), indent=1) + "\n", encoding="utf-8")
    beside.replace(folder / FILE)
    return folder


def versions() -> dict[str, str]:
    """Of Python, the system and the packages that matter, without importing any."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _next_folder(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    known = [int(path.name) for path in root.iterdir() if path.name.isdigit()]
    for number in range(max(known, default=0) + 1, _MOST_CAPSULES + 1):
        with contextlib.suppress(FileExistsError):  # of two at once, one takes the next
            folder = root / f"{number:04d}"
            folder.mkdir()
            return folder
    raise OSError(28, f"{root} is full", str(root))


def _begun(run_dir: Path) -> dict[str, Any]:
    """How the newest attempt began."""
    lines = read_ledger(run_dir / "ledger.jsonl").lines
    return next((line for line in reversed(lines) if line["kind"] == "begin" and well_formed(line)), {})


def _ids(begun: Mapping[str, Any], skipped: Any, step: int) -> list[int]:
    """For a rank that could not tell: ids are a function of the step."""
    from .cursor import sample_ids  # here: it needs numpy, which an agent otherwise does not

    windows = [(begin, end) for begin, end in skipped]
    ids: list[int] = sample_ids(begun["seed"], step - 1, begun["global_batch"], begun["size"], windows).tolist()
    return ids


def _checkpoint_before(run_dir: Path, step: int | None, known: str | None) -> str | None:
    """The newest checkpoint of a step before this one; else the one that the attempt began from."""
    published = sorted(path.parent for path in (run_dir / "checkpoints").glob("s*/MANIFEST.json"))
    before = [path for path in published if step is None or int(path.name[1:9]) < step]
    return str(before[-1]) if before else known


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _clean(value: Any, environ: Mapping[str, str]) -> Any:
    """The value with all its texts redacted, and paths as texts."""
    if isinstance(value, str | os.PathLike):
        return redacted(os.fspath(value), environ)
    if isinstance(value, Mapping):
        return {str(key): _clean(item, environ) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, environ) for item in value]
    return value
