"""What the shell completes: names of strategies, launchers and runs."""

from __future__ import annotations

from pathlib import Path


def strategies(incomplete: str) -> list[str]:
    """Names of strategies that start so."""
    return _names("strategies", incomplete)


def launchers(incomplete: str) -> list[str]:
    """Names of launchers that start so."""
    return _names("launchers", incomplete)


def runs(incomplete: str) -> list[str]:
    """Ids of runs in `runs`, newest first."""
    found = sorted(Path("runs").glob(f"{incomplete}*/recipe.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent.name for path in found]


def _names(group: str, incomplete: str) -> list[str]:
    from ..registry import entries

    return [name for name in entries(group) if name.startswith(incomplete)]
