"""How plain values become a frozen dataclass: every key known, every value of its field's type.

One dataclass is the schema of one group of keys. A field's metadata may hold `help`, the sentence of the reference,
and `key`, its name in YAML where Python cannot spell it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import RecipeError
from .yaml_text import Places

T = TypeVar("T")

NOWHERE = Places()


def build(kind: type[T], values: Mapping[str, Any], where: str = "", places: Places = NOWHERE) -> T:
    """An instance of the dataclass from plain values; `where` is the dotted key of the group.

    Raises RecipeError, with the place of the key where it is known: an unknown or missing key, a value of another
    type, or what the class itself refuses.
    """
    fields = keys_of(kind)
    hints = get_type_hints(kind)
    for key in values:
        if key not in fields:
            raise _unknown(kind, where, key, values[key], places)
    arguments = {}
    for key, field in fields.items():
        path = join(where, key)
        if key in values:
            arguments[field.name] = convert(hints[field.name], values[key], path, places)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            about = field.metadata.get("help")
            raise places.error(path, f"no key {path!r}; it must be given{f': {about}' if about else ''}")
    try:
        return kind(**arguments)
    except RecipeError as error:  # a class's own checks start with the key they are about
        raise places.error(_first_key(str(error), where), str(error)) from None


def keys_of(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """The keys of a dataclass, as written in YAML, with their fields."""
    return {field.metadata.get("key") or field.name: field for field in dataclasses.fields(kind) if field.init}


def join(where: str, key: str) -> str:
    """The dotted key of `key` in the group `where`."""
    return f"{where}.{key}" if where else key


def convert(hint: Any, value: Any, path: str, places: Places = NOWHERE) -> Any:
    """The value as the type says: whole numbers may stand for numbers, lists for tuples. Raises RecipeError."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return build(hint, value, path, places)
    if _is_union(hint):
        members = get_args(hint)
        if value is None and type(None) in members:
            return None
        fitting = [member for member in members if _fits(member, value)]
        if fitting:
            return convert(fitting[0], value, path, places)
    elif _fits(hint, value):
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is float:
            return _finite(value, path, places)
        if origin is tuple:
            kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
            return tuple(
                convert(kind, item, f"{path}[{number}]", places)
                for number, (kind, item) in enumerate(zip(kinds, value, strict=True))
            )
        if origin is not None and origin is not Literal:
            inner = arguments[1]
            return types.MappingProxyType(
                {key: convert(inner, item, join(path, key), places) for key, item in value.items()}
            )
        return value
    raise places.error(path, f"{path} is {shown(value)}; it must be {phrase(hint)}")


def phrase(hint: Any) -> str:
    """A type in words: `a whole number or null`."""
    if _is_union(hint):
        *most, last = [phrase(member) for member in get_args(hint)]
        return f"{', '.join(most)} or {last}"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"a list of {count}{_PLURALS.get(arguments[0], 'values')}"
    if origin is not None or dataclasses.is_dataclass(hint):
        return "a group of keys"
    return _WORDS[hint]


def shown(value: Any) -> str:
    """A value as a message names it, with its type where that is the point."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a group of keys"
    if isinstance(value, bool):
        return "true (bool)" if value else "false (bool)"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


_WORDS = {
    Any: "anything",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_PLURALS = {str: "texts", int: "whole numbers", float: "numbers"}


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _fits(hint: Any, value: Any) -> bool:
    """True when the value is of that type, its items aside."""
    if hint is Any:
        return True
    if hint in (int, float):  # a bool is an int to Python, and to nobody else
        return isinstance(value, int | float if hint is float else int) and not isinstance(value, bool)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in arguments)
    if origin is tuple:
        return isinstance(value, list | tuple) and (arguments[-1] is Ellipsis or len(value) == len(arguments))
    if origin is not None or dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    return isinstance(value, hint)


def _finite(value: Any, path: str, places: Places) -> float:
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        raise places.error(path, f"{path} is {number}; it must be a finite number")
    return number


def _unknown(kind: Any, where: str, key: str, value: Any, places: Places) -> RecipeError:
    """The error on an unknown key, with what its writer may have meant: a key of this group or of one within."""
    tail = ""
    while isinstance(value, Mapping) and len(value) == 1:  # `optimzer.lr=1` is told as it was typed
        inner, value = next(iter(value.items()))
        tail += f".{inner}"
    path, known = join(where, key) + tail, list(keys_of(kind))
    first, dot, rest = key.partition(".")
    if dot and first in known:
        meant = f"; write it as a group: `{first}: {{{rest}: ...}}`"
    elif close := difflib.get_close_matches(key, known, n=1):
        meant = f", did you mean {join(where, close[0]) + tail!r}?"
    elif len(elsewhere := [path for path in _paths(kind, where) if path.rpartition(".")[2] == key]) == 1:
        meant = f", did you mean {elsewhere[0]!r}?"
    else:
        meant = f"; {where or 'a recipe'} has the keys {', '.join(known)}"
    misspelt = join(where, key)  # its line, rather than that of what is below it
    return places.error(misspelt if misspelt in places.keys else path, f"no key {path!r}{meant}")


def _paths(kind: Any, where: str) -> Iterable[str]:
    """Every dotted key of a dataclass and of the dataclasses in it."""
    hints = get_type_hints(kind)
    for key, field in keys_of(kind).items():
        yield join(where, key)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _paths(hints[field.name], join(where, key))


def _first_key(message: str, where: str) -> str:
    """The dotted key that a message starts with; the group itself if it starts with none."""
    word = message.partition(" ")[0]
    if not where or word == where or word.startswith((f"{where}.", f"{where}[")):
        return word
    return join(where, word)
