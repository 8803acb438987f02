"""unitrain: one Trainer, any backend, any cluster, nothing lost.

Names are imported on first use, so that `import unitrain` costs milliseconds and needs no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch as Batch
    from .cursor import Cursor as Cursor
    from .data.source import DatasetSource as DatasetSource
    from .data.source import Source as Source
    from .errors import UnitrainError as UnitrainError
    from .launch import launch as launch
    from .launcher import Launcher as Launcher
    from .recipe import OptimizerRecipe as OptimizerRecipe
    from .recipe import Recipe as Recipe
    from .recipe_file import load_recipe as load_recipe
    from .strategy import Engine as Engine
    from .strategy import HyperParameters as HyperParameters
    from .strategy import Loss as Loss
    from .strategy import Role as Role
    from .strategy import StepOut as StepOut
    from .strategy import Strategy as Strategy
    from .trainer import Trainer as Trainer
    from .world import World as World

__version__ = "0.1.0"

_HOME = {
    "ArraySource": "data.arrays",
    "Batch": "batch",
    "Cursor": "cursor",
    "DatasetSource": "data.source",
    "Engine": "strategy",
    "HyperParameters": "strategy",
    "Launcher": "launcher",
    "Loss": "strategy",
    "OptimizerRecipe": "recipe",
    "Recipe": "recipe",
    "Role": "strategy",
    "Source": "data.source",
    "StepOut": "strategy",
    "Strategy": "strategy",
    "Trainer": "trainer",
    "UnitrainError": "errors",
    "World": "world",
    "launch": "launch",
    "load_recipe": "recipe_file",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unitrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
