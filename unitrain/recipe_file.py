"""How a recipe file and overrides become a checked Recipe, and a Recipe a file again.

Precedence: the file, then `--strategy` and its like, then `key=value` in the order given. A value is assigned whole:
`model={name: mlp}` leaves nothing of the file's model.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import registry
from .errors import RecipeError, Refused, UnknownName
from .recipe import DataRecipe, ModelRecipe, Recipe
from .schema import build as build
from .schema import join, keys_of
from .strategy import Cluster, Problem
from .yaml_text import COMMAND_LINE, MAX_BYTES, MAX_DEPTH, REFERENCE, Places, read_group, read_value, write

BUILT_IN_TRAINERS = "unitrain.tasks:"
NAMED = {"model": "models", "data": "sources"}  # groups of a name and its own options -> where names are known


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    strategy: str | None = None,
    launcher: str | None = None,
    nproc: int | None = None,
    nodes: int | None = None,
) -> Recipe:
    """The recipe in a file, with `key=value` overrides.

    A trainer's file may stand beside the recipe. Raises RecipeError with file and line.
    """
    path = Path(path)
    changes = _changes(strategy, launcher, nproc, nodes, overrides)
    return _recipe(_text(path), str(path), changes, beside=path.parent)


def recipe_from_text(text: str, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a text; `where` names it in messages. Raises RecipeError."""
    return _recipe(text, where, _changes(None, None, None, None, overrides), beside=None)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, every key written out; also what YAML and JSON hold."""
    values: dict[str, Any] = _plain(recipe)
    for group in NAMED:
        named = values.pop(group)
        if named["name"] or named["options"]:
            values[group] = ({"name": named["name"]} if named["name"] else {}) | named["options"]
    return {key: values[key] for key in keys_of(Recipe) if key in values}


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a file that `load_recipe` reads back to an equal one."""
    return write(to_dict(recipe))


def check(recipe: Recipe, *, with_strategy: bool = False, installed: bool = True) -> None:
    """Refuse, before anything starts, what cannot run as a whole.

    Asks the strategy too where that needs no framework, or where `with_strategy` bears with importing one (the
    Trainer always asks). With `installed` the packages of launcher and strategy must be here, the latter's unless the
    ranks run elsewhere.
    Raises UnknownName, MissingExtra, RecipeError, or Refused with every problem and its alternative.
    """
    how = registry.known("launchers", recipe.launcher.name)
    strategy = registry.known("strategies", recipe.strategy.name)
    if installed:
        registry.entry("launchers", recipe.launcher.name)
        if not how.remote:
            registry.entry("strategies", recipe.strategy.name)
    launcher = registry.resolve(how.path)
    cluster = Cluster(nodes=recipe.launcher.nodes, nproc=recipe.launcher.nproc)
    if cluster.ranks > recipe.train.global_batch:
        raise RecipeError(
            f"{cluster.ranks} ranks cannot share a batch of {recipe.train.global_batch} samples; "
            f"use at most {recipe.train.global_batch} ranks or a larger train.global_batch"
        )
    _check_module(recipe.trainer)
    if recipe.rl:
        from .rl.recipe import check_rl  # for the few recipes that have it

        check_rl(recipe)
    problems: list[Problem] = launcher.problems(recipe)
    if strategy.problems:
        problems += registry.resolve(strategy.problems)(recipe, cluster)
    elif with_strategy:
        problems += registry.resolve(strategy.path).problems(recipe, cluster)
    refuse_problems(problems)


def refuse_problems(problems: Iterable[Problem]) -> None:
    """Raise Refused with every problem and what to do instead, if there is any."""
    if lines := [f"{problem.what}; {problem.instead}" for problem in problems]:
        raise Refused(lines[0] if len(lines) == 1 else "\n  - ".join(["the recipe cannot run as it is:", *lines]))


def _text(path: Path) -> str:
    if path.is_dir():
        raise RecipeError(f"{path} is a folder, not a recipe file{_nearest(path, path)}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(f"{path} is larger than {MAX_BYTES >> 20} MiB; a recipe is a page of settings")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise RecipeError(f"no recipe file {str(path)!r}{_nearest(path, path.parent)}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: byte {content[error.start]:#04x} is not UTF-8 text; save it as UTF-8"
        ) from error
    except OSError as error:
        raise RecipeError(f"recipe file {str(path)!r} cannot be read: {error.strerror}") from error


def _nearest(path: Path, folder: Path) -> str:
    """What the folder has instead: the file of the closest name, else a few of its recipes."""
    known = sorted(str(found) for ending in ("*.yaml", "*.yml") for found in folder.glob(ending))
    if path != folder and (close := difflib.get_close_matches(str(path), known, n=1)):
        return f", did you mean {close[0]!r}?"
    return f"; in {folder} there are {', '.join(Path(name).name for name in known[:8])}" if known else ""


def _changes(
    strategy: str | None, launcher: str | None, nproc: int | None, nodes: int | None, overrides: Sequence[str]
) -> list[tuple[str, Any]]:
    """Dotted keys and values, in the order in which they are assigned."""
    flags = {"strategy.name": strategy, "launcher.name": launcher, "launcher.nproc": nproc, "launcher.nodes": nodes}
    changes = [(key, value) for key, value in flags.items() if value is not None]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise RecipeError(f"{COMMAND_LINE}: {override!r} is not key=value, such as train.steps=200")
        changes.append((key, read_value(text)))
    return changes


def _recipe(text: str, where: str, changes: Sequence[tuple[str, Any]], beside: Path | None) -> Recipe:
    values, places = read_group(text, where)
    for key, value in changes:
        _assign(values, key, value)
        places = places.given_anew(key, COMMAND_LINE)
    values = _References(values, places).resolved(values)
    for group in NAMED:
        if isinstance(named := values.get(group), dict):
            options = {key: value for key, value in named.items() if key != "name"}
            values[group] = {"options": options} | ({"name": named["name"]} if "name" in named else {})
    if beside is not None and isinstance(values.get("trainer"), str):
        values["trainer"] = _found(values["trainer"], beside, places)
    recipe = build(Recipe, values, places=places)
    for group in NAMED:
        _check_named(recipe, group, places)
    return recipe


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making groups on the way."""
    *groups, last = key.split(".")
    for depth, group in enumerate(groups, start=1):
        inner = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{COMMAND_LINE}: {'.'.join(groups[:depth])} is {inner!r}, which has no key {last!r}")
        values = inner
    if groups in (["strategy"], ["launcher"]) and last == "name" and values.get("name") != value:
        values.pop("options", None)  # they were another backend's own
    values[last] = value


class _References:
    """Replaces `${group.key}` by the value of that key, defaults included."""

    def __init__(self, values: Mapping[str, Any], places: Places) -> None:
        self.values, self.places = values, places
        self.size = 0

    def resolved(self, value: Any, path: str = "", opened: tuple[str, ...] = ()) -> Any:
        """The value without references. Raises RecipeError for one that leads nowhere, or to itself."""
        # references to texts of references grow as a power: count what comes out
        self.size += len(value) + 1 if isinstance(value, str) else 1
        if self.size > MAX_BYTES:
            raise self.places.error(path, f"{path} grows beyond {MAX_BYTES >> 20} MiB once its references are replaced")
        if isinstance(value, dict):
            return {key: self.resolved(item, join(path, key), opened) for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolved(item, f"{path}[{number}]", opened) for number, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        if whole := REFERENCE.fullmatch(value):
            return self._target(whole[1], path, opened)
        return REFERENCE.sub(lambda match: str(self._target(match[1], path, opened)), value)

    def _target(self, key: str, path: str, opened: tuple[str, ...]) -> Any:
        if key in opened or len(opened) >= MAX_DEPTH:
            how = "to itself" if key in opened else f"through more than {MAX_DEPTH} others"
            raise self.places.error(path, f"{path} refers {how}, by ${{{key}}}")
        for values in (self.values, _DEFAULTS):
            found: Any = values
            for part in key.split("."):
                found = found.get(part, _ABSENT) if isinstance(found, Mapping) else _ABSENT
            if found is not _ABSENT:
                return self.resolved(found, path, (*opened, key))
        raise self.places.error(path, f"{path} refers to ${{{key}}}, and the recipe has no such key")


_ABSENT = object()


def _check_named(recipe: Recipe, group: str, places: Places) -> None:
    """A built-in model or source has a schema of its own; another name is the trainer's business."""
    named: ModelRecipe | DataRecipe = getattr(recipe, group)
    known = registry.entries(NAMED[group])
    if named.name in known:
        build(registry.load(NAMED[group], named.name), named.options, group, places)
    elif recipe.trainer.startswith(BUILT_IN_TRAINERS):
        if not named.name:
            raise places.error(group, f"no key '{group}.name'; {recipe.trainer} needs one of {', '.join(known)}")
        raise UnknownName("model" if group == "model" else "data source", named.name, known)


def _found(trainer: str, beside: Path, places: Places) -> str:
    """`path/to/file.py:Class` with the whole path of the file, which stands here or beside the recipe."""
    file, colon, name = trainer.rpartition(":")
    if not file.endswith(".py"):
        return trainer
    for folder in (Path(), beside):
        if (folder / file).is_file():
            return f"{(folder / file).resolve()}{colon}{name}"
    nor = "" if beside.resolve() == Path.cwd() else f", nor beside the recipe in {beside}"
    raise places.error("trainer", f"trainer is {trainer!r}, and there is no file {file!r} in {Path.cwd()}{nor}")


def _check_module(trainer: str) -> None:
    """Refuse a trainer whose package is not there; imports nothing of it."""
    module = trainer.partition(":")[0]
    if module.endswith(".py"):
        return
    top = module.partition(".")[0]
    ours = top == __package__  # cheap to look into; another package would run code
    if not (Path(top).is_dir() or Path(f"{top}.py").is_file() or _spec(module if ours else top)):
        raise RecipeError(
            f"trainer is {trainer!r}, but no module {module if ours else top!r} can be found; "
            "install it, or give path/to/file.py:Class"
        )


def _spec(module: str) -> object:
    try:
        return importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # a parent that is no package; a relative name
        return None


def _plain(value: Any) -> Any:
    """A dataclass, mapping or tuple as dicts and lists."""
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(getattr(value, field.name)) for key, field in keys_of(type(value)).items()}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


_DEFAULTS = {key: value for key, value in to_dict(Recipe(trainer=":")).items() if key != "trainer"}
