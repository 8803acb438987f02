"""Which checkpoint folders may go: pure decisions from lists of names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_NAME = re.compile(r"s(\d{8,16})-([A-Za-z0-9][A-Za-z0-9_-]{0,47})(?:\.(\d{1,4}))?")


class FolderName(NamedTuple):
    """`s00000100-<nonce of the attempt>`; where the attempt saves a step again, `.2` and so on follows."""

    step: int
    nonce: str
    number: int = 1

    @classmethod
    def parse(cls, text: str) -> FolderName | None:
        """The name that the text spells, or None for any other file or folder."""
        found = _NAME.fullmatch(text)
        name = cls(int(found[1]), found[2], int(found[3] or 1)) if found else None
        return name if str(name) == text else None  # not s000000100 beside s00000100

    def __str__(self) -> str:
        return f"s{self.step:08d}-{self.nonce}" + (f".{self.number}" if self.number > 1 else "")


def doomed(published: Iterable[FolderName], *, keep: int, newest: FolderName) -> list[FolderName]:
    """Published checkpoints to delete, oldest first, now that `newest` is published too.

    Later steps belong to a lineage that this attempt has passed over, as damaged: they stay for inspection and
    count as nothing, or they would crowd out every sound one.
    """
    older = sorted(name for name in published if name.step <= newest.step and name != newest)
    return older[: max(len(older) - (keep - 1), 0)]


def abandoned(unpublished: Iterable[FolderName], *, coming: FolderName) -> list[FolderName]:
    """Folders of saves that never came to an end, now that `coming` is to be written.

    Those of other attempts, and the earlier ones of this. An attempt owns its root: whoever still writes under
    another nonce has been replaced.
    """
    return sorted(
        name
        for name in unpublished
        if name.nonce != coming.nonce or (name.step, name.number) < (coming.step, coming.number)
    )
