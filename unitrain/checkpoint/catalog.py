"""Which checkpoints a run has, and the newest one that is sound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from .files import Folder, open_folder
from .manifest import MANIFEST
from .reader import CheckpointReader, Verify
from .retention import FolderName


class Found(NamedTuple):
    """A published checkpoint."""

    step: int
    folder: str  # path or URL


class PassedOver(NamedTuple):
    """A checkpoint that cannot be used, kept for inspection, and why."""

    folder: str  # path or URL
    reason: str


class Newest(NamedTuple):
    """What a run resumes from, if anything, and the newer checkpoints that it cannot."""

    reader: CheckpointReader | None
    passed_over: list[PassedOver]


class Catalog(NamedTuple):
    """All checkpoints under a root."""

    sound: list[Found]  # by step; by manifest and sizes only
    damaged: list[PassedOver]


def list_checkpoints(root: str) -> Catalog:
    """All checkpoints of a run, judged by their manifests and sizes; unfinished saves are none."""
    sound, damaged = [], []
    for folder, opened in _newest_first(open_folder(root)):
        if isinstance(opened, CheckpointReader):
            sound.append(Found(opened.step, folder))
        else:
            damaged.append(PassedOver(folder, str(opened)))
    return Catalog(sound[::-1], damaged[::-1])


def newest(root: str) -> Found | None:
    """The newest checkpoint, judged by its manifest and sizes."""
    reader = open_newest(root, verify="manifest").reader
    return Found(reader.step, reader.folder) if reader else None


def open_newest(root: str, *, verify: Verify = "full") -> Newest:
    """The newest sound checkpoint, if any, and the newer ones that are not.

    With `verify="full"` every byte of it has been compared. Raises CheckpointMismatch where the newest is of a
    later format than this version reads: falling back from it would lose steps unasked.
    """
    passed_over: list[PassedOver] = []
    for folder, opened in _newest_first(open_folder(root), verify):
        if isinstance(opened, CheckpointReader):
            try:
                if verify == "full":
                    opened.verify()
                return Newest(opened, passed_over)
            except CheckpointError as error:
                opened = error
        if isinstance(opened, CheckpointMismatch):
            raise opened
        passed_over.append(PassedOver(folder, str(opened)))
    return Newest(None, passed_over)


def _newest_first(
    root: Folder, verify: Verify = "manifest"
) -> Iterator[tuple[str, CheckpointReader | CheckpointError]]:
    """Each published checkpoint, opened or with what is wrong; of one step, the last published first."""
    steps: dict[int, list[FolderName]] = {}
    for text in root.names():
        if name := FolderName.parse(text):
            steps.setdefault(name.step, []).append(name)
    for step in sorted(steps, reverse=True):
        opened = [(root.sub(str(name)).url, _open(root, name, verify)) for name in steps[step]]
        published = [(folder, reader) for folder, reader in opened if reader is not None]
        yield from sorted(published, key=_published_at, reverse=True)


def _open(root: Folder, name: FolderName, verify: Verify) -> CheckpointReader | CheckpointError | None:
    """The checkpoint, or what is wrong with it, or None for a save that was never published."""
    folder = root.sub(str(name))
    try:
        folder.size(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return CheckpointError(f"{folder.url} could not be read: {error}")
    try:
        reader = CheckpointReader(folder, verify=verify)
    except CheckpointError as error:
        return error
    if reader.step != name.step:
        return CheckpointDamaged(f"{folder.url} is damaged: its manifest is that of step {reader.step}")
    return reader


def _published_at(pair: tuple[str, CheckpointReader | CheckpointError]) -> float:
    return pair[1].manifest.time if isinstance(pair[1], CheckpointReader) else -1.0
