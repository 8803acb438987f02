"""A drill as a table for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .drill import Trouble
from .verdict import Verdict

PLAIN_WIDTH = 160  # where no terminal says how wide it is


def show(found: Verdict) -> None:
    """Print what came of each fault, and of the run as a whole."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("fault", no_wrap=True)
    table.add_column("what happened", overflow="fold")
    for name in ("steps redone", "s to a step", "s to a new step"):
        table.add_column(name, justify="right")
    table.add_column("verdict", overflow="fold")
    for trouble in found.troubles:
        table.add_row(*_cells(trouble))
    console.print(table)
    for line in _notes(found):
        console.print(line, soft_wrap=True)


def _cells(trouble: Trouble) -> list[Text]:
    happened = f"{trouble.happened}, after step {trouble.step}" if trouble.happened else ""
    texts = [
        str(trouble.fault),
        happened,
        "" if trouble.redone is None else str(trouble.redone),
        *("" if seconds is None else f"{seconds:.2f}" for seconds in (trouble.seconds, trouble.new_seconds)),
    ]
    return [*map(Text, texts), Text(trouble.verdict, style="green" if trouble.survived else "bold red")]


def _notes(found: Verdict) -> Iterator[Text]:
    yield _note(f"samples lost: {found.samples_lost}, repeated: {found.samples_repeated}",
                found.samples_lost == found.samples_repeated == 0)  # fmt: skip
    wrong = found.audit_problems
    yield _note(f"ledger: {wrong[0] if wrong else 'each sample was used once, as the audit proves'}", not wrong)
    other = found.first_other_step
    losses = "every bit is that of the undisturbed run" if other is None else f"another one first in step {other}"
    yield _note(f"losses: {losses}", other is None)
    if found.error:
        yield _note(f"final weights: {found.error}", good=False)
    elif found.weights_differ:
        told = f"{len(found.weights_differ)} of {found.tensors} tensors differ, first {found.weights_differ[0]}"
        yield _note(f"final weights: {told}", good=False)
    else:
        yield _note(f"final weights: every bit of {found.tensors} tensors is that of the undisturbed run", good=True)


def _note(text: str, good: bool) -> Text:
    return Text(text, style="" if good else "red")
