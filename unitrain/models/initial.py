"""Initial weights: which values does a parameter of this name begin with, whoever holds it?

A value is a pure function of (rule, name, shape, seed). Every framework, rank and sharding that asks for the
same name gets the same bits, so two backends start from one model without sending it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ..cursor import mix
from ..errors import UserError

Initial = Callable[[str, tuple[int, ...], int], NDArray[np.float32]]  # (canonical name, global shape, seed) -> values


def by_name(rules: Mapping[str, Initial]) -> Initial:
    """The rule of the first pattern (a regular expression) that matches the whole name."""

    def value(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        for pattern, rule in rules.items():
            if re.fullmatch(pattern, name):
                return rule(name, shape, seed)
        raise UserError(f"the model has no initial value for {name!r}; add a rule whose pattern matches that name")

    return value


def normal(std: float) -> Initial:
    """Gaussian values of mean 0."""

    def value(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        values = generator(name, seed).standard_normal(shape, dtype=np.float32)
        values *= np.float32(std)
        return values

    return value


def fan_in_normal(gain: float) -> Initial:
    """Gaussian values of std gain / sqrt(inputs of one output); gain sqrt(2) before a ReLU.

    He et al., "Delving Deep into Rectifiers", 2015. Shapes are (outputs, inputs, *kernel).
    """

    def value(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        return normal(gain / math.sqrt(math.prod(shape[1:])))(name, shape, seed)

    return value


def constant(number: float) -> Initial:
    """The same number everywhere."""

    def value(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
        return np.full(shape, number, dtype=np.float32)

    return value


def generator(name: str, seed: int) -> np.random.Generator:
    """A stream of its own for each (name, seed), whatever was drawn before.

    Philox counts (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), so the key alone sets its
    bits. numpy keeps Philox fixed for ever, and what it draws from it fixed within a version.
    """
    # Python's own hash of a string differs from process to process.
    place = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.Philox(key=mix(seed, place)))
