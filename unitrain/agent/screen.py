"""What a person sees of a run: rank 0's log as it grows, or a live panel on a terminal."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from ..track.panel import Panel  # not at run time: rich takes its time to import


class Stream:
    """Passes the text on as it comes."""

    def __init__(self) -> None:
        self._line_open = False

    def progress(self, message: dict[str, Any]) -> None:
        """A step that the run announces; its line is in the text too."""

    def text(self, text: str) -> None:
        """What rank 0 has written, in whatever pieces."""
        if text:
            _write(sys.stdout, text)
            self._line_open = not text.endswith("\n")

    def end_line(self) -> None:
        """End a line that was cut off."""
        if self._line_open:
            _write(sys.stdout, "\n")
            self._line_open = False

    def close(self) -> None:
        """End the last line."""
        self.end_line()


class Silent(Stream):
    """Shows nothing: rank 0 is on another node."""

    def text(self, text: str) -> None:
        """See Stream."""


class LivePanel:
    """Draws progress in one place of the terminal and prints all other lines above it."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._panel: Panel | None = None
        self._announced: Counter[str] = Counter()
        self._rest = ""

    def progress(self, message: dict[str, Any]) -> None:
        """Draw the step; its line of the log, which comes later, is not printed."""
        if self._panel is None:
            from ..track.panel import Panel

            self._panel = Panel(self._title, message["steps"])
        self._announced[message["line"]] += 1
        self._panel.update(message["record"])

    def text(self, text: str) -> None:
        """Print whole lines that no progress announced."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._print(line)

    def end_line(self) -> None:
        """Print what is left of a line that was cut off."""
        if self._rest:
            self._print(self._rest)
            self._rest = ""

    def close(self) -> None:
        """Print what is left and leave the panel as it stands."""
        self.end_line()
        if self._panel is not None:
            self._panel.close()

    def _print(self, line: str) -> None:
        if self._announced[line]:
            self._announced[line] -= 1
        elif self._panel is not None:
            self._panel.print(line)
        else:
            print(line, flush=True)


def screen_for(title: str) -> Stream | LivePanel:
    """A panel on a terminal, the plain text elsewhere."""
    return LivePanel(title) if sys.stdout.isatty() else Stream()


def say(text: str) -> None:
    """What the agent says itself, after all that was shown."""
    _write(sys.stderr, f"{text}\n")


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:  # nobody listens any more, as after `| head`; the run goes on
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
