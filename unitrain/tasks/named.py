"""The built-in model that a recipe names."""

from __future__ import annotations

from typing import Any

from .. import registry
from ..errors import RecipeError
from ..recipe import Recipe
from ..schema import build


def named_model(recipe: Recipe, *kinds: type) -> Any:
    """The options of the recipe's model. Raises RecipeError where it is none of the kinds that a task can train."""
    kind = registry.load("models", recipe.model.name)
    if kind not in kinds:
        raise RecipeError(
            f"{recipe.trainer} cannot train model {recipe.model.name!r}; "
            f"it trains {', '.join(known.__name__.lower() for known in kinds)}"
        )
    return build(kind, recipe.model.options, "model")
