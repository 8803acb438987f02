"""`unitrain import`: a recipe from what another tool was configured with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RecipeError, UserError

if TYPE_CHECKING:
    from ..importers.foreign import Imported

TRAINER = "unitrain.tasks:LanguageModel"
# what that trainer needs besides
PLACEHOLDER = {"model": {"name": "gpt", "size": "tiny"}, "data": {"name": "text", "path": "python-stdlib"}}


def import_(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="PATH", help="An accelerate config, a ds_config.json, or the folder of a DeepSpeed checkpoint."
        ),
    ] = None,
    torchrun: Annotated[
        str | None, typer.Option("--torchrun", metavar="COMMAND", help="A torchrun command line instead, in quotes.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Write it there; a file that exists is kept.")
    ] = None,
    trainer: Annotated[str, typer.Option("--trainer", metavar="MODULE:CLASS", help="The recipe's trainer.")] = TRAINER,
) -> None:
    """Turn another tool's configuration into a recipe, and list what of it was not understood.

    The recipe goes to stdout, or to the file of --to; notes go to stderr. Nothing of the configuration is run.
    """
    if (path is None) == (torchrun is None):
        raise UserError("give one of PATH and --torchrun COMMAND")
    if to is not None and to.exists():
        raise UserError(f"{to} exists already; give --to another name, or move it away")
    if path is not None and path.is_dir():
        _import_checkpoint(path, to)
        return
    imported, source = _imported(path, torchrun)
    text, refusals = _recipe(imported, source, trainer)
    for note in [*_notes(imported, trainer), *refusals]:
        print(_line(note), file=sys.stderr)
    if to is None:
        print(text, end="")
    else:
        try:
            with to.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{to} cannot be written: {error.strerror}") from error
        print(f"wrote {to}", file=sys.stderr)


def _imported(path: Path | None, torchrun: str | None) -> tuple[Imported, str]:
    """What was understood, and of what."""
    from ..importers import accelerate, ds_config, foreign
    from ..importers.torchrun import import_torchrun

    if path is None:
        assert torchrun is not None, "one of them was given"
        return import_torchrun(torchrun), "a torchrun command"
    values = foreign.read_file(path)
    if accelerate.looks_like_accelerate(values):
        return accelerate.import_accelerate(path), path.name
    if ds_config.looks_like_deepspeed(values):
        return ds_config.read_ds_config(path), path.name
    raise RecipeError(
        f"{path} is neither an accelerate config (no distributed_type) nor a DeepSpeed one (no zero_optimization, no "
        "batch size); give one of these"
    )


def _import_checkpoint(folder: Path, to: Path | None) -> None:
    if to is None:
        raise UserError(f"{folder} is a folder, read as a DeepSpeed checkpoint: give --to FOLDER for what it becomes")
    from ..importers.deepspeed_checkpoint import import_deepspeed_checkpoint

    found = import_deepspeed_checkpoint(folder, to)
    kind = "fp32 masters" if found.masters else "weights of forward passes, in their own dtype"
    print(
        _line(f"note: {found.tensors} tensors, {found.elements} elements, {kind}; moments are left out"),
        file=sys.stderr,
    )
    print(f"wrote {to}", file=sys.stderr)


def _recipe(imported: Imported, source: str, trainer: str) -> tuple[str, list[str]]:
    """The recipe's text, which loads, and what of it a launch would refuse.

    Raises RecipeError where the configuration holds values that no recipe takes.
    """
    from .. import registry
    from ..recipe import Recipe
    from ..recipe_file import recipe_from_text
    from ..schema import keys_of
    from ..strategy import Cluster
    from ..yaml_text import write

    values: dict[str, Any] = {"trainer": trainer, **(PLACEHOLDER if trainer == TRAINER else {})}
    for name, field in keys_of(Recipe).items():
        if found := imported.recipe.get(name):
            kind = field.default_factory
            values[name] = {key: found[key] for key in keys_of(kind) if key in found}
    text = f"# from {_line(source)}, by unitrain import\n{write(values)}"
    recipe = recipe_from_text(text, f"the recipe of {source}")
    cluster = Cluster(nodes=recipe.launcher.nodes, nproc=recipe.launcher.nproc)
    problems = registry.resolve(registry.STRATEGIES[recipe.strategy.name].problems)(recipe, cluster)
    return text, [f"note: a launch will refuse this: {problem.what}; {problem.instead}" for problem in problems]


def _notes(imported: Imported, trainer: str) -> list[str]:
    notes = [f"note: {note}" for note in imported.notes]
    if trainer == TRAINER:
        notes.append("note: trainer, model and data are placeholders; name your own with --trainer module:Class")
    return notes + [f"not understood: {key}: {value}" for key, value in imported.unknown.items()]


def _line(text: str) -> str:
    """The text on one line, without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
