"""Who may publish under a root: the newest attempt alone. One that was replaced, and wakes up late, may not.

The file OWNER holds the nonce of the attempt that took the root over last. An attempt that takes over removes the
unfinished saves of all others before it looks for the newest checkpoint: what they publish later has no folder any
more, and what they published before is seen. Whoever finds another owner publishes nothing and deletes nothing.
"""

from __future__ import annotations

import contextlib
import errno

from ..errors import CheckpointError
from .files import Folder, open_folder
from .manifest import MANIFEST
from .retention import FolderName

OWNER = "OWNER"
_MOST_BYTES = 100


class Replaced(CheckpointError):
    """Another attempt of the run has taken over."""


def take_over(root: str, nonce: str) -> None:
    """Make the attempt of this nonce the owner. Raises CheckpointError where the storage fails; nobody owns it then."""
    folder = open_folder(root)
    try:
        folder.make()
        folder.publish(OWNER, nonce.encode())
        _remove_unfinished(folder, nonce)
    except Exception as error:  # of any storage library
        with contextlib.suppress(Exception):  # a full disk has room for this
            folder.delete(OWNER)
        raise CheckpointError(f"{folder.url} could not be taken over: {type(error).__name__}: {error}") from error


def refuse_replaced(root: Folder, nonce: str) -> None:
    """Raise Replaced where another attempt owns the root. One that nobody has taken over is everybody's."""
    try:
        owner = root.read(OWNER, most=_MOST_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return
    if owner != nonce:
        raise Replaced(f"attempt {nonce} was replaced by attempt {owner}, which goes on with {root.url}")


def _remove_unfinished(folder: Folder, nonce: str) -> None:
    for text in folder.names():
        name = FolderName.parse(text)
        if name is None or name.nonce == nonce or folder.linked(text):
            continue
        if MANIFEST not in folder.sub(text).names():
            _remove(folder.sub(text))


def _remove(folder: Folder) -> None:
    """Also under the hands of an attempt that still writes: its next save is refused before it makes a folder."""
    while True:
        try:
            folder.delete(MANIFEST)  # published after parts of it were removed
            folder.remove()
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
