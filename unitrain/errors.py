"""What can go wrong, as one tree, and the exit code that each branch ends in.

UnitrainError                      70   a run failed
├── UserError                      78   nothing was started; retrying cannot help
│   ├── RecipeError                     a key, a type, a value or a combination in the recipe
│   ├── UnknownName                     no strategy, launcher, model, ... of that name
│   ├── MissingExtra                    a backend's package is not installed
│   └── Refused                         this strategy or launcher cannot honour this recipe
├── DataError                      70   a sample or a data file could not be read
├── CheckpointError                70   a checkpoint could not be written
│   ├── CheckpointDamaged               bytes differ from what the manifest promises
│   └── CheckpointMismatch         78   a checkpoint of another model, data set or seed
├── RankFailed                     70   a rank of the run ended with an error
├── Diverged                       70   the training itself failed; another attempt would too
└── ReplicasDiffer                 70   ranks that should hold the same weights do not
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

MOST_LETTERS = 4000  # of a message


class ExitCode(IntEnum):
    """What schedulers and agents may do next depends on this number alone."""

    DONE = 0
    FAILED = 70
    PREEMPTED = 75  # saved; requeue me
    BAD_RECIPE = 78  # never retry
    CRASH_LOOP = 93


class UnitrainError(Exception):
    """An expected failure: its message says what failed, what was found and what to do."""

    exit_code: ExitCode = ExitCode.FAILED
    retry: bool = True  # False: from the same checkpoint it would fail in the same way

    def __init__(self, message: str = "") -> None:
        # What was found may be megabytes of a file: they are not printed.
        cut = f"... ({len(message)} letters)" if len(message) > MOST_LETTERS else ""
        super().__init__(message[:MOST_LETTERS] + cut)

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: the message as it is, whatever the class makes its own from."""
        return _as_it_was, (type(self), self.args, self.__dict__)


def _as_it_was(kind: type[UnitrainError], args: tuple[Any, ...], facts: dict[str, Any]) -> UnitrainError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(facts)
    return error


class UserError(UnitrainError):
    """The request itself is wrong; found before anything starts."""

    exit_code = ExitCode.BAD_RECIPE


class RecipeError(UserError):
    """A recipe that cannot be used."""


class UnknownName(UserError):
    """A name that no registry knows."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(f"no {what} named {name!r}{did_you_mean(name, names)}; known: {', '.join(names)}")


class MissingExtra(UserError):
    """A backend whose package is not installed."""

    def __init__(self, what: str, package: str, extra: str, *, install: str = "") -> None:
        command = install or f"pip install 'unitrain[{extra}]'"
        super().__init__(f"{what} needs {package}: {command}")


class Refused(UserError):
    """A strategy or launcher that cannot honour the recipe, with what can."""


class DataError(UnitrainError):
    """A sample or a data file that could not be read."""


class CheckpointError(UnitrainError):
    """A checkpoint that could not be written or read."""


class CheckpointDamaged(CheckpointError):
    """Bytes that differ from what the manifest promises."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint that belongs to another model, data set or seed."""

    exit_code = ExitCode.BAD_RECIPE


class Diverged(UnitrainError):
    """No finite gradient, or one loss spike after the other: the guard ends the run."""

    retry = False


class ReplicasDiffer(UnitrainError):
    """Ranks that should hold the same weights do not."""


class RankFailed(UnitrainError):
    """A rank ended with an error; carries the exit code of the first one."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def type_name(kind: type[BaseException]) -> str:
    """An exception's type as records and reports name it."""
    plain = kind.__module__ in ("builtins", "__main__")
    return kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` where one known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
