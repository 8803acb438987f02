"""Weights that a run begins with: those of another run's checkpoint, read box by box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import CheckpointReader, open_newest
from ..errors import RecipeError
from ..recipe import Recipe
from ..recipe_file import load_recipe
from ..run import Run

_BASE, _ADAPTER = ".base_layer", ".lora_"


class Base:
    """The role `model` of a run's newest checkpoint, or of the checkpoint in a folder."""

    def __init__(self, where: str, key: str) -> None:
        self.where, self.key = where, key
        if Run.exists(where):
            run = Run(where)
            newest = open_newest(run.checkpoints(load_recipe(run.recipe_path)), verify="manifest").reader
            if newest is None:
                raise RecipeError(f"{key} is {where!r}, a run that has no sound checkpoint; let it save one first")
            folder = newest.folder
        elif (Path(where) / "MANIFEST.json").is_file():
            folder = where
        else:
            raise RecipeError(
                f"{key} is {where!r}, which is neither a run's folder nor a checkpoint; train it first, or correct the "
                "path"
            )
        self.reader = CheckpointReader(folder)
        self.role = self.reader.role("model")

    @property
    def digest(self) -> str:
        """The same for the same checkpoint."""
        return self.reader.digest

    def recipe(self) -> Recipe:
        """The recipe of the run. Raises RecipeError for a checkpoint without one."""
        if not Run.exists(self.where):
            raise RecipeError(f"{self.key} is {self.where!r}; give the folder of its run")
        return load_recipe(Run(self.where).recipe_path)

    def value(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        """The whole parameter; None for adapters, which begin anew. Raises RecipeError where it lacks or differs."""
        for candidate in (name, name.replace(_BASE, "")):
            info: Any = self.role.tensors.get(("param", candidate))
            if info is None:
                continue
            if tuple(info.shape) != shape:
                raise RecipeError(
                    f"{self.key} {self.where} holds {candidate} of shape {tuple(info.shape)}, but this model's is "
                    f"{shape}; use the same model: and tokenizer"
                )
            return np.asarray(self.role.read("param", candidate, (0,) * len(shape), shape), dtype=np.float32)
        if _ADAPTER in name:
            return None
        raise RecipeError(
            f"{self.key} {self.where} has no weights for {name}; use the same model:, and for a run of adapters "
            "`unitrain export --merge` and model.path"
        )
