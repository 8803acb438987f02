"""How YAML text becomes plain values and the line of each, and plain values text; nothing in it is run or looked up.

OmegaConf reads the values, so that `1e-4` is a number. Before it does, the text is scanned for what only an accident
or an attack puts in a recipe: tags, resolvers, deep nesting, many aliases, numbers that YAML reads as other numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with omegaconf, without types
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ALIASES = 100
MAX_NODES = 10_000  # with every alias written out

COMMAND_LINE = "on the command line"

REFERENCE = re.compile(r"\$\{([\w.-]+)\}")  # ${group.key}; anything else in braces would be looked up or run

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[\d_]+(:[0-5]?\d)+(\.[\d_]*)?)")  # 010 is 8, and 2:00:00 is 7200


@dataclass(frozen=True)
class Places:
    """Where each key was written, for messages: `gpt.yaml:12`, or `on the command line`."""

    file: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)  # dotted key -> place

    def of(self, key: str) -> str:
        """The place of the key, or of the nearest group around it that has one."""
        while key:
            if key in self.keys:
                return self.keys[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.file

    def error(self, key: str, message: str) -> RecipeError:
        """The message, after the place of the key."""
        place = self.of(key)
        return RecipeError(f"{place}: {message}" if place else message)

    def given_anew(self, key: str, place: str) -> Places:
        """The same, once the key and all below it were written at another place."""
        kept = {old: there for old, there in self.keys.items() if not f"{old}.".startswith((f"{key}.", f"{key}["))}
        return Places(self.file, {**kept, key: place})


def read_group(text: str, file: str) -> tuple[dict[str, Any], Places]:
    """A mapping of plain values and where each stands. Raises RecipeError with file and line."""
    _scan(text, file)
    with _translated(file):
        root = yaml.compose(text, Loader=_LOADER)
        if root is None:
            raise RecipeError(f"{file} is empty; a recipe needs at least the key 'trainer'")
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"{file}:1: this is {_kind(root)}; a recipe is groups of keys such as `train:`")
        keys: dict[str, str] = {}
        for count, (key, line) in enumerate(_keys(root, "", file)):
            keys.setdefault(key, f"{file}:{line}")
            if count > MAX_NODES:
                raise RecipeError(f"{file} holds more than {MAX_NODES} values once its aliases are written out")
        values = OmegaConf.create(text, max_yaml_expanded_nodes=None)  # counted above
        return _plain(OmegaConf.to_container(values, resolve=False), file), Places(file, keys)


def read_value(text: str) -> Any:
    """One value as given on the command line: a number, a word, `[1, 2]`, `{a: 1}`, null."""
    _scan(text, COMMAND_LINE)
    with _translated(COMMAND_LINE):
        values = OmegaConf.from_dotlist([f"value={text}"])
        return _plain(OmegaConf.to_container(values, resolve=False), COMMAND_LINE)["value"]


def write(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read_group` reads back; lists stay on one line."""
    return str(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


@contextmanager
def _translated(file: str) -> Iterator[None]:
    """Errors of the YAML libraries inside the block become RecipeErrors with file and line."""
    try:
        yield
    # ValueError: a number too long for Python, or text that is no Unicode
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        place = _place(file, mark.line + 1) if mark else file
        raise RecipeError(f"{place}: this is not YAML: {problem}") from error


def _scan(text: str, file: str) -> None:
    """Refuse, before any value is built, what no recipe needs."""
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{file} is larger than {MAX_BYTES >> 20} MiB; a recipe is a page of settings")
    depth = aliases = 0
    with _translated(file):
        for event in yaml.parse(text, Loader=_LOADER):
            place = _place(file, event.start_mark.line + 1)
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.AliasEvent):
                aliases += 1
            elif isinstance(event, yaml.ScalarEvent):
                _check_scalar(event.value, event.style or "", place)
            if depth > MAX_DEPTH:
                raise RecipeError(f"{place}: groups are nested deeper than {MAX_DEPTH}")
            if aliases > MAX_ALIASES:
                raise RecipeError(f"{place}: there are more than {MAX_ALIASES} aliases (`*name`)")
            if tag := getattr(event, "tag", None):
                raise RecipeError(f"{place}: the tag {tag.replace(_TAG, '!!')} is refused; a recipe holds plain values")


def _check_scalar(text: str, quotes: str, place: str) -> None:
    if "${" in REFERENCE.sub("", text):
        found = text[text.index("${") :]
        found = found if len(found) < 60 else f"{found[:60]}..."
        raise RecipeError(
            f"{place}: {found!r} is refused: recipes read neither the environment nor run code; "
            "only ${group.key}, another key of the recipe, can stand here"
        )
    if not quotes and _ODD_NUMBER.fullmatch(text):
        number = yaml.safe_load(text)
        if isinstance(number, int | float) and str(number) != text:
            raise RecipeError(f"{place}: YAML reads {text} as the number {number}; put it in quotes")


def _keys(node: Any, prefix: str, file: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    """(dotted key, line) of everything below a node; refuses keys given twice and keys that are no words."""
    if depth > MAX_DEPTH:
        raise RecipeError(
            f"{file}:{node.start_mark.line + 1}: aliases nest deeper than {MAX_DEPTH}, or hold themselves"
        )
    if isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            path = f"{prefix}[{number}]"
            yield path, child.start_mark.line + 1
            yield from _keys(child, path, file, depth + 1)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    merged: list[Any] = []
    for key, child in node.value:
        line = key.start_mark.line + 1
        if key.tag == f"{_TAG}merge":
            merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
            continue
        if key.tag != f"{_TAG}str":
            raise RecipeError(f"{file}:{line}: a key must be a word; {_kind(key)} stands here")
        path = f"{prefix}.{key.value}" if prefix else key.value
        if key.value in lines:
            raise RecipeError(f"{file}:{line}: the key {path!r} was given before, in line {lines[key.value]}")
        lines[key.value] = line
        yield path, line
        yield from _keys(child, path, file, depth + 1)
    for group in merged:  # after the group's own keys, which win
        yield prefix, group.start_mark.line + 1  # counts, also where the group is empty
        yield from _keys(group, prefix, file, depth + 1)


def _plain(values: Any, file: str) -> Any:
    """The same values; refuses a key that OmegaConf alone reads as a number, such as `1e3`."""
    if isinstance(values, list):
        return [_plain(value, file) for value in values]
    if not isinstance(values, dict):
        return values
    for key in values:
        if not isinstance(key, str):
            raise RecipeError(f"{file}: a key must be a word; {key!r} stands somewhere")
    return {key: _plain(value, file) for key, value in values.items()}


def _place(file: str, line: int) -> str:
    return file if file == COMMAND_LINE else f"{file}:{line}"


def _kind(node: Any) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "a group of keys"
    return f"{node.value!r} ({node.tag.removeprefix(_TAG)})"


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Lists on one line, no aliases, and quotes around words that a reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def _represent_text(dumper: Any, text: str) -> Any:
    style = "'" if text[:1] in tuple("+-.0123456789") and text.isprintable() else None
    if "\x85" in text:  # a line break, which single quotes would turn into a space
        style = '"'
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


def _represent_list(dumper: Any, values: list[Any]) -> Any:
    return dumper.represent_sequence(f"{_TAG}seq", values, flow_style=True)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
