"""A disk that can be filled: a file system in memory, of a size of its own, seen by this process and what it starts."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

from ..errors import UserError

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_PRIVATE_ALL = (1 << 18) | (1 << 14)  # what is mounted here is seen nowhere else
_FILLER = ".filler"
_CHUNK = bytes(1 << 20)


class Disk:
    """The folder of a run's checkpoints on a file system of its own."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        """Raises UserError where the kernel allows no mount of one's own."""
        self._folder = folder
        folder.mkdir(parents=True)
        libc = ctypes.CDLL(None, use_errno=True)
        ids = f"0 {os.geteuid()} 1", f"0 {os.getegid()} 1"
        if libc.unshare(_CLONE_NEWNS) != 0:
            _check(libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER))
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(ids[0])
            Path("/proc/self/gid_map").write_text(ids[1])
        _check(libc.mount(b"none", b"/", None, _MS_PRIVATE_ALL, None))
        _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={num_bytes}".encode()))
        self._libc = libc

    def fill(self) -> None:
        """Leave no byte free."""
        descriptor = os.open(self._folder / _FILLER, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
        try:
            while True:
                os.write(descriptor, _CHUNK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(descriptor)

    def free(self) -> None:
        """Make room again."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._folder / _FILLER)

    def settle(self) -> None:
        """Bring what lies on it to the disk below, and unmount it."""
        self.free()
        beside = self._folder.with_name(f"{self._folder.name}.kept")
        shutil.copytree(self._folder, beside)
        _check(self._libc.umount2(os.fsencode(self._folder), 0))
        self._folder.rmdir()
        beside.rename(self._folder)


def _check(result: int) -> None:
    if result != 0:
        reason = os.strerror(ctypes.get_errno())
        raise UserError(
            f"--enospc needs a file system of its own, and the kernel allows none here ({reason}); leave it out, or "
            "run as root or where user namespaces are allowed"
        )
