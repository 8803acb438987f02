"""Which lines of rank 0's log are a library's own noise: they stay in the log, and no terminal shows them."""

from __future__ import annotations

import re

# What Gloo inside jaxlib prints, with no way to stop it, whenever it connects ranks.
_NOISE = (re.compile(r"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. .*"),)
_BEGINNINGS = ("[Gloo] Rank ",)


class NoiseFilter:
    """Takes noise out of a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""

    def without_noise(self, text: str) -> str:
        """The text without lines of noise. What may become one is held back until its line ends."""
        *lines, last = (self._held + text).split("\n")
        self._held = last if last and any(last.startswith(b) or b.startswith(last) for b in _BEGINNINGS) else ""
        whole = "".join(f"{line}\n" for line in lines if not any(pattern.fullmatch(line) for pattern in _NOISE))
        return whole if self._held else whole + last

    def rest(self) -> str:
        """What was held back and has not become a line."""
        held, self._held = self._held, ""
        return held
