"""A verification as a table for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..track import lines
from .verification import Row, Verification

PLAIN_WIDTH = 160  # where no terminal says how wide it is: in a file, lines may be long


def show(found: Verification) -> None:
    """Print the table, what each tier means, and what was not run and why."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    for name in ("ranks", "max loss diff", "first step beyond", "weights diff", "seconds", "memory"):
        table.add_column(name, justify="right")
    table.add_column("tier", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in found.rows:
        table.add_row(*_cells(row))
    console.print(table)
    for line in _notes(found):
        console.print(line, soft_wrap=True)


def _cells(row: Row) -> list[Text]:
    outcome, comparison = row.outcome, row.comparison
    texts = [outcome.trial.strategy, str(outcome.trial.ranks)]
    if comparison is None:
        texts += ["", "", ""]
    else:
        texts += [
            _share(comparison.largest),
            str(comparison.first_beyond or "none"),
            _share(comparison.weights.difference),
        ]
    texts.append("" if outcome.seconds is None else f"{outcome.seconds:.1f}")
    texts.append("" if outcome.memory_bytes is None else lines.size(outcome.memory_bytes))
    texts.append("" if comparison is None else comparison.tier.name)
    color = "" if row.is_reference and row.good else "green" if row.good else "bold red"
    return [*map(Text, texts), Text("failed" if outcome.error else row.verdict, style=color)]


def _share(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _notes(found: Verification) -> Iterator[Text]:
    for tier in dict.fromkeys(row.comparison.tier for row in found.rows if row.comparison):
        yield Text(
            f"tier {tier.name}: losses within {tier.losses:g} and final weights within {tier.weights:g}, relative"
            f" ({tier.because})",
            style="dim",
        )
    for row in found.rows:
        if row.outcome.error:
            yield Text(f"{row.outcome.trial.strategy} {row.verdict} (see {row.outcome.folder})", style="red")
        elif row.comparison is not None and row.comparison.verdict == "weights differ":
            yield Text(f"{row.outcome.trial.strategy}: most in {row.comparison.weights.tensor}", style="red")
    for name, why, reason in found.left_out:
        yield Text(f"not run: {name}, {why}: {reason}", style="yellow")
