"""Which class a recipe's `trainer:` names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from .trainer import Trainer


def resolve_trainer(path: str, *, beside: Path | None = None) -> type[Trainer]:
    """The class at `module:Class` or `path/to/file.py:Class`.

    Modules are also looked for in the working directory, and files in the folder `beside` (the recipe's). Raises
    RecipeError where there is no such module, class or Trainer; errors of the module itself come through as they are.
    """
    from .trainer import Trainer

    where, _, name = path.rpartition(":")
    module = _file_module(where, beside) if where.endswith(".py") else _named_module(where)
    found = getattr(module, name, None)
    trainers = [key for key, value in vars(module).items() if _is_trainer(value, Trainer) and value is not Trainer]
    known = f"; its trainers: {', '.join(trainers)}" if trainers else "; it has no subclass of unitrain.Trainer"
    if found is None:
        raise RecipeError(f"trainer is {path!r}, but {where} has no {name}{did_you_mean(name, trainers)}{known}")
    if not _is_trainer(found, Trainer):
        raise RecipeError(f"trainer is {path!r}, but {name} is not a subclass of unitrain.Trainer{known}")
    trainer: type[Trainer] = found
    return trainer


def _is_trainer(value: object, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def _named_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise RecipeError(f"trainer is in {name!r}, which is no module's name; for a file, write path/to/file.py:Class")
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)  # as `python` itself does; a console script does not
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there, and something that it imports is not
        raise RecipeError(
            f"trainer is in the module {name!r}, but there is no module {error.name!r} in {folder} or among the "
            "installed packages; for a file, write path/to/file.py:Class"
        ) from error


def _file_module(file: str, beside: Path | None) -> ModuleType:
    folders = [Path.cwd(), *([beside] if beside is not None else [])]
    try:
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    except OSError as error:
        raise RecipeError(f"trainer is in the file {file!r}, which cannot be looked for: {error.strerror}") from error
    if path is None:
        raise RecipeError(f"trainer is in the file {file!r}, which is not in {' or '.join(map(str, folders))}")
    path = path.resolve()
    name = path.stem
    if name in sys.modules:
        if getattr(sys.modules[name], "__file__", None) == str(path):
            return sys.modules[name]
        name = f"unitrain_trainer_{name}"  # another module has its name, perhaps one of Python's own
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python path/to/file.py` does
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "every .py file has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
