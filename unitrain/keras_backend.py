"""Which framework does Keras 3 run on, and is this model one of Keras? Imports neither Keras nor a framework."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from .errors import UserError


def settle_keras(framework: str) -> None:
    """Have Keras, when it is imported, run on a strategy's framework; where it has been, `build_any` checks."""
    if framework and "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = framework


def settle_keras_device(device: str) -> None:
    """Have Keras's torch backend make its tensors there; `keras.device` would do so in one thread only."""
    os.environ["KERAS_TORCH_DEVICE"] = device
    core: Any = sys.modules.get("keras.src.backend.torch.core")
    if core is not None:
        core.DEFAULT_DEVICE = device


def is_keras(model: Any) -> bool:
    """True for a model or layer of Keras 3, on whatever backend."""
    keras: Any = sys.modules.get("keras")  # who has a model of Keras has imported it
    return keras is not None and hasattr(keras, "Layer") and isinstance(model, keras.Layer)


def build_any(make: Callable[[], Any], framework: str, seed: int) -> Any:
    """What `make` returns; a Keras model comes with names and values that are the same on every backend.

    Raises UserError for a Keras model on another backend than the framework, and for one that is not built.
    """
    if "keras" not in sys.modules:
        model = make()
        if not is_keras(model):
            return model
        del model  # made while nobody watched: Keras was imported by `make` itself
    if not hasattr(sys.modules["keras"], "Layer"):  # its import has failed, or is of an older Keras
        return make()
    from .models import state_keras

    with state_keras.watched() as initializers:
        model = make()
    if is_keras(model):
        check_backend(framework)
        state_keras.prepare(model, initializers, seed)
    return model


def check_backend(framework: str) -> None:
    """Raise UserError where Keras runs on another framework than the strategy's."""
    found = sys.modules["keras"].backend.backend()
    if found != framework:
        raise UserError(
            f"build_model returned a Keras model on the {found} backend, and the strategy needs {framework}: Keras was "
            f"imported before the strategy was known; start Python with KERAS_BACKEND={framework}, or import keras "
            "nowhere but in the Trainer's own file"
        )
