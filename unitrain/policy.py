"""When to log, evaluate and save: pure functions of the step."""

from __future__ import annotations


def due(step: int, every: int | None, steps: int) -> bool:
    """Whether something that happens every so many steps happens after step `step` (from 1) of `steps`.

    `every` None means at the end only, 0 never; any other number also means at the end.
    """
    if every == 0 or step == 0:
        return False
    return step == steps or (every is not None and step % every == 0)
