"""Tables of functions by name that research code extends: advantage estimators, policy and preference losses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import RecipeError, UnknownName, UserError, did_you_mean
from ..registry import resolve

F = TypeVar("F", bound=Callable[..., Any])


class Registry:
    """Functions of one kind by name. A name with a colon is the path of a function that nobody registered."""

    def __init__(self, what: str, built_in: Mapping[str, str]) -> None:
        self.what = what  # as messages call it
        self._paths = dict(built_in)  # name -> "module:function", imported when asked for
        self._own: dict[str, Callable[..., Any]] = {}

    @property
    def names(self) -> list[str]:
        """Every registered name."""
        return sorted([*self._paths, *self._own])

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator: add a function under a name. Raises UserError where another one has it."""

        def add(function: F) -> F:
            known = self._paths.get(name) or (_path(self._own[name]) if name in self._own else None)
            if known is not None and known != _path(function):
                raise UserError(f"the {self.what} {name!r} is {known} already; choose another name")
            self._own[name] = function
            return function

        return add

    def get(self, name: str) -> Callable[..., Any]:
        """The function of that name, imported now. Raises UnknownName."""
        if name in self._own:
            return self._own[name]
        if name not in self._paths and ":" not in name:
            raise UnknownName(self.what, name, self.names)
        found: Callable[..., Any] = resolve(self._paths.get(name, name))
        return found

    def bind(self, name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
        """The function with its options set. Raises RecipeError for an option that it does not have."""
        function = self.get(name)
        parameters = inspect.signature(function).parameters.values()
        known = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
            for option in options:
                if option not in known:
                    raise RecipeError(
                        f"the {self.what} {name!r} has no option {option!r}{did_you_mean(option, known)}; "
                        f"it has {', '.join(known) or 'none'}"
                    )
        return functools.partial(function, **options)


def _path(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


# (episodes: advantages.Episodes, *, options) -> advantages.Advantages
ADVANTAGES = Registry(
    "advantage estimator",
    {
        "gae": "unitrain.rl.advantages:gae",
        "grpo": "unitrain.rl.advantages:grpo",
        "dr_grpo": "unitrain.rl.advantages:dr_grpo",
        "rloo": "unitrain.rl.advantages:rloo",
        "reinforce++": "unitrain.rl.advantages:reinforce_pp",
    },
)

# (tokens: policy_losses_torch.Tokens, *, options) -> policy_losses_torch.PerToken
POLICY_LOSSES = Registry(
    "policy loss",
    {name: f"unitrain.rl.policy_losses_torch:{name}" for name in ("ppo", "gspo", "cispo")},
)

# (pairs: preferences_torch.Pairs, *, options) -> Loss
PREFERENCE_LOSSES = Registry(
    "preference loss",
    {name: f"unitrain.rl.preferences_torch:{name}" for name in ("dpo", "cdpo", "ipo")},
)
