"""The live panel of a run in a terminal: how far, how well, how fast."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from . import lines

MOST_WIDTH = 100  # a wider panel is harder to read
_LEAST_FOR_BAR = 56
_LEAST_FOR_FRAME = 36


class Panel:
    """Redraws itself in place, below whatever else is printed through it.

    `update` takes the records of metrics.jsonl and the events of events.jsonl as they come.
    """

    def __init__(self, title: str, steps: int, console: Console | None = None) -> None:
        self.title, self.steps = title, steps
        self.console = console or Console()
        self.train: dict[str, Any] = {}  # the newest records
        self.eval: dict[str, Any] = {}
        self.saved: int | None = None  # step of the newest checkpoint
        self.losses: deque[float | None] = deque(maxlen=MOST_WIDTH)
        # refreshed by `update` alone: no thread draws behind the agent's back
        self._live = Live(self, console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._live.start(refresh=True)

    def update(self, record: Mapping[str, Any]) -> None:
        """Take in a record or an event, and redraw."""
        if record.get("split") == "train":
            self.train = dict(record)
            self.losses.append(record.get("loss"))
        elif record.get("split") == "eval":
            self.eval = dict(record)
        elif record.get("event") == "checkpoint":
            self.saved = record.get("step")
        self._live.refresh()

    def print(self, line: str) -> None:
        """Print a line above the panel, as it is."""
        self.console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen. Safe to call twice."""
        self._live.stop()

    def __enter__(self) -> Panel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, MOST_WIDTH)
        if width < _LEAST_FOR_FRAME:
            yield self._table(width)
            return
        title = Text(self.title, style="bold", overflow="ellipsis", no_wrap=True)
        yield Frame(self._table(width - 4), title=title, title_align="left", width=width, border_style="dim")

    def _table(self, width: int) -> Table:
        """Rows of a name and what there is to say."""
        label, room = 6, width - 8
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=label, style="dim", no_wrap=True)
        table.add_column(width=room, no_wrap=True, overflow="ellipsis")
        table.add_row("step", self._progress(room))
        if self.train:
            table.add_row("loss", self._loss(room))
            for row in self._pairs(room):
                table.add_row(*row)
        else:
            table.add_row("", Text("starting", style="dim"))
        if self.eval:
            table.add_row("eval", Text(lines.evaluation_line(self.eval).removeprefix("eval ")))
        if self.saved is not None:
            table.add_row("saved", Text(f"step {self.saved}"))
        return table

    def _progress(self, room: int) -> Table:
        step = self.train.get("step", 0)
        left = lines.seconds_left(self.train, self.steps) if self.train else None
        texts = [f"{step:>{len(str(self.steps))}}/{self.steps}", f"{step / self.steps if self.steps else 1:>4.0%}"]
        if left is not None and step < self.steps:
            texts.append(f"eta {lines.duration(left)}")
        while len("  ".join(texts)) > room and len(texts) > 1:
            texts.pop()
        cells: list[Text | ProgressBar] = [Text(text) for text in texts]
        if room + 8 >= _LEAST_FOR_BAR:
            bar = room - sum(len(text) + 2 for text in texts)
            cells.insert(
                1,
                ProgressBar(
                    total=max(self.steps, 1), completed=step, width=bar, complete_style="green", finished_style="green"
                ),
            )
        row = Table.grid(padding=(0, 2, 0, 0))
        for _ in cells:
            row.add_column(no_wrap=True)
        row.add_row(*cells)
        return row

    def _loss(self, room: int) -> Text:
        loss = Text(lines.number(self.train.get("loss")), style="bold")
        if lines.skipped(self.train):
            loss.append("  update skipped", style="bold red")
        for name, value in lines.metrics(self.train).items():
            loss.append(f"  {name} {lines.number(value)}", style="not bold")
        curve = lines.sparkline(list(self.losses), min(room - len(loss) - 2, 60))
        if len(curve) > 1:
            loss.append(f"  {curve}", style="not bold cyan")
        return loss

    def _pairs(self, room: int) -> list[tuple[str, Text]]:
        """Speed and the like, on one row where it fits."""
        record = self.train
        speed = [lines.throughput(record)]
        if record.get("mfu"):
            speed.append(f"mfu {record['mfu']:.0%}")
        if record.get("memory_bytes"):
            speed.append(f"memory {lines.size(record['memory_bytes'])}")
        moves = []
        if "lr" in record:
            moves.append(lines.rate(record["lr"]))
        if "grad_norm" in record:
            moves.append(f"norm {lines.short(record['grad_norm'])}")
        rows = [("lr", moves), ("speed", [text for text in speed if text])]
        return [(name, Text("  ".join(texts))) for name, texts in rows if texts]
