"""Train a classifier on labelled samples."""

from __future__ import annotations

import functools

from ..errors import RecipeError
from ..models.config import MLP, ConvNet
from .named import NamedModel, named_model


class Classification(NamedModel):
    """`model:` is an mlp or a convnet; `data:` a source of arrays x (rows, ...), float32, and y (rows,), int64."""

    @functools.cached_property
    def config(self) -> MLP | ConvNet:
        """The model's options. Raises RecipeError where they do not fit what the data says of itself."""
        options: MLP | ConvNet = named_model(self.recipe, MLP, ConvNet)
        source = self._source()
        num_classes = getattr(source, "num_classes", 0)
        if options.num_classes < num_classes:
            raise RecipeError(
                f"model.num_classes is {options.num_classes}, but the data has {num_classes} classes; "
                f"use at least {num_classes}"
            )
        shape = getattr(source, "shape", None)
        if shape is not None:
            options.check_sample(shape)
        return options
