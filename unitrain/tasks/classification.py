"""Train a classifier on labelled samples."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import registry
from ..errors import RecipeError
from ..models.config import MLP, ConvNet
from ..strategy import Loss
from ..trainer import Trainer
from .named import named_model


class Classification(Trainer):
    """`model:` is an mlp or a convnet; `data:` a source of arrays x (rows, ...), float32, and y (rows,), int64."""

    def build_model(self) -> nn.Module:
        """See Trainer."""
        module: nn.Module = registry.resolve(self.config.modules["torch"])(self.config)
        return module

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        """See Trainer."""
        return self.config.initial(name, shape, seed)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Cross entropy in nats, in fp32, summed over rows; also the share of rows that are classified correctly."""
        logits, classes = model(batch["x"]).float(), batch["y"].long()
        total = nn.functional.cross_entropy(logits, classes, reduction="sum")
        correct = (logits.argmax(dim=1) == classes).sum()
        return Loss(total, len(classes), {"accuracy": (correct, len(classes))})

    @functools.cached_property
    def config(self) -> MLP | ConvNet:
        """The model's options. Raises RecipeError where they do not fit what the data says of itself."""
        options: MLP | ConvNet = named_model(self.recipe, MLP, ConvNet)
        if self.train_source is None:
            self.train_source = self.build_source("train")
        num_classes = getattr(self.train_source, "num_classes", 0)
        if options.num_classes < num_classes:
            raise RecipeError(
                f"model.num_classes is {options.num_classes}, but the data has {num_classes} classes; "
                f"use at least {num_classes}"
            )
        shape = getattr(self.train_source, "shape", None)
        if shape is not None:
            options.check_sample(shape)
        return options
