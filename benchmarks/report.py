"""Figures as people read them, and the machine that they come from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "accelerate", "numpy")


class Machine:
    """Taken at the start: what else it does then, it will most likely do meanwhile."""

    def __init__(self) -> None:
        self.load_before = os.getloadavg()[0]

    def facts(self) -> dict[str, Any]:
        """Everything that one must know to judge the figures."""
        return {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "load_before": round(self.load_before, 1),
            "load_after": round(os.getloadavg()[0], 1),
        }


def facts_in_words(facts: dict[str, Any]) -> str:
    """The facts as a Markdown list."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"- command: `{facts['command']}`\n"
        f"- date: {facts['date']}\n"
        f"- Python {facts['python']}, {versions}\n"
        f"- {facts['cpu']}, {facts['cores']} cores; load average {facts['load_before']} before, "
        f"{facts['load_after']} after\n"
    )


def ratio(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Median of the paired ratios and the bounds of its 95 % bootstrap interval."""
    ratios = [our / other for our, other in zip(ours, others, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[-51]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that can be read as it is: text to the left, figures to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    left = [not any(_is_figure(row[column]) for row in rows) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        parts = (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(cells, widths, left, strict=True))
        return f"| {' | '.join(parts)} |"

    rule = "|".join("-" * (w + 2) if to_left else "-" * (w + 1) + ":" for w, to_left in zip(widths, left, strict=True))
    return "\n".join([line(head), f"|{rule}|", *(line(row) for row in rows)]) + "\n"


def write(path: Path, content: str | dict[str, Any]) -> None:
    """Text as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:2].strip("+-")[:1].isdigit()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
