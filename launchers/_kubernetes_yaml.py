"""Objects as YAML that a person reads and any parser reads back as the same values: every doubtful word is quoted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes without types

# A word that no parser of YAML 1.1 or 1.2 takes for anything but itself.
_PLAIN = re.compile(r"(?!(?:true|false|yes|no|on|off|null|y|n)$)[A-Za-z/][A-Za-z0-9/._-]*", re.IGNORECASE)


def to_text(documents: Iterable[Mapping[str, Any]]) -> str:
    """One document after the other."""
    parts = (yaml.dump(dict(d), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110) for d in documents)
    return "---\n".join(parts)


def from_text(text: str) -> list[dict[str, Any]]:
    """The documents of such a text."""
    return list(yaml.safe_load_all(text))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """No aliases, quotes around all but plain words, and texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        """Lists stand below their key, not beside it."""
        return super().increase_indent(flow, False)


def _represent_text(dumper: Any, text: str) -> Any:
    style = None if _PLAIN.fullmatch(text) else "'"
    if "\n" in text and all(line.isprintable() for line in text.split("\n")):
        style = "|"
    elif not text.isprintable():
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
