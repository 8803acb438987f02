"""What a check has found, and what findings of several nodes say together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """Of one check, worst last."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check on one node."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""  # one line; empty where nothing need be done
    node: str = ""  # its host name; empty where it is about all nodes

    @classmethod
    def from_json(cls, values: Any) -> Finding:
        """What another node has sent. Raises ValueError, TypeError or KeyError for anything else."""
        return cls(**{**values, "verdict": Verdict(values["verdict"])})


def passed(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check=check, verdict=Verdict.PASS, found=found)


def warned(check: str, found: str, fix: str) -> Finding:
    """A run would go on, but worse than it could."""
    return Finding(check=check, verdict=Verdict.WARN, found=found, fix=fix)


def failed(check: str, found: str, fix: str) -> Finding:
    """A run would fail, now or in the middle of the night."""
    return Finding(check=check, verdict=Verdict.FAIL, found=found, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the same check has found on some nodes."""

    check: str
    verdict: Verdict
    found: str
    fix: str
    nodes: tuple[str, ...]


def rows(findings: Iterable[Finding]) -> list[Row]:
    """One for each different finding, in the order of the checks."""
    together: dict[tuple[str, Verdict, str, str], list[str]] = {}
    for one in findings:
        together.setdefault((one.check, one.verdict, one.found, one.fix), []).append(one.node)
    order = list(dict.fromkeys(check for check, *_ in together))
    found = [
        Row(check=check, verdict=verdict, found=found, fix=fix, nodes=tuple(node for node in nodes if node))
        for (check, verdict, found, fix), nodes in together.items()
    ]
    return sorted(found, key=lambda row: order.index(row.check))


def worst(findings: Iterable[Finding | Row]) -> Verdict:
    """Of all; nothing found is nothing wrong."""
    order = list(Verdict)
    return max((one.verdict for one in findings), key=order.index, default=Verdict.PASS)


def compared(check: str, values: Sequence[tuple[str, str]], fix: str, *, absent: str = "none") -> list[Finding]:
    """One finding where all nodes have the same value, and else one for each that differs from most."""
    counts = [value for _, value in values]
    usual = max(sorted(set(counts)), key=counts.count)
    if set(counts) == {usual}:
        return [passed(check, usual or absent)]
    return [
        Finding(
            check=check, verdict=Verdict.FAIL, found=f"{value or absent}, others {usual or absent}", fix=fix, node=node
        )
        for node, value in values
        if value != usual
    ]
