"""Every file operation of checkpoints: durable writes, atomic publishing, and the same on any fsspec URL.

A file is written once, under a name that is never used again, and never changed. `write` and `publish` return
when the bytes will outlive a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import CheckpointDamaged

_READ_BYTES = 1 << 20  # stays in the processor's cache until it is hashed


class FileRecord(NamedTuple):
    """What a file must hold."""

    size: int  # bytes
    sha256: str  # hexadecimal

    @classmethod
    def of(cls, data: bytes) -> FileRecord:
        """That of a file with these bytes."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


class Folder(ABC):
    """A local or remote folder. Failures of the storage are OSError."""

    url: str

    @abstractmethod
    def sub(self, name: str) -> Folder:
        """The folder of that name inside, whether or not it exists."""

    @abstractmethod
    def make(self) -> None:
        """Create it and its parents where they are missing."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the files and folders inside, sorted; none where there is no such folder."""

    def linked(self, name: str) -> bool:
        """True for a name that leads elsewhere: nothing behind it is ours to delete."""
        return False

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def range(self, name: str, start: int, length: int) -> memoryview:
        """A part of a file, fewer bytes where the file ends. Local bytes are mapped, not read."""

    @abstractmethod
    def publish(self, name: str, data: bytes) -> None:
        """Write a file that is there whole or not at all."""

    def touch(self, name: str, data: bytes) -> None:
        """Change a file's stamp, by writing it anew where there is no other way."""
        self.publish(name, data)

    def stamp(self, name: str) -> str:
        """Another text than before whenever the file was touched or written meanwhile."""
        return self.read(name, most=1 << 20).hex()

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file if it is there, for good."""

    @abstractmethod
    def remove(self) -> None:
        """Delete the folder and the files in it."""

    def read(self, name: str, *, most: int) -> bytes:
        """A whole file. Raises CheckpointDamaged where it is larger than `most` bytes."""
        if (size := self.size(name)) > most:
            raise CheckpointDamaged(f"{self.url}/{name} has {size} bytes, more than the {most} that it may have")
        with self._opened(name) as stream:
            return stream.read(size)  # not `most`: Python makes room for as much as it is asked for

    def record(self, name: str) -> FileRecord:
        """What a file holds now; reads all of it."""
        total, digest = 0, hashlib.sha256()
        with self._opened(name) as stream:
            while piece := stream.read(_READ_BYTES):
                total += len(piece)
                digest.update(piece)
        return FileRecord(total, digest.hexdigest())

    def write(self, name: str, chunks: Sequence[bytes | memoryview]) -> FileRecord:
        """Write a new file from chunks, hashing on a second thread meanwhile."""
        with ThreadPoolExecutor(1) as hashing:
            digest = hashing.submit(_sha256, chunks)
            self._store(name, chunks)
            return FileRecord(sum(len(chunk) for chunk in chunks), digest.result())

    @abstractmethod
    def _store(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a new file; a failure may leave a part of it."""

    @abstractmethod
    def _opened(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to read from its start."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def open_folder(url: str | os.PathLike[str]) -> Folder:
    """The folder of a local path, a `file://` URL or any other fsspec URL."""
    text = os.fspath(url)
    protocol, mark, rest = text.partition("://")
    if not mark:
        return LocalFolder(Path(text))
    return LocalFolder(Path(rest)) if protocol in ("file", "local") else RemoteFolder(text)


class LocalFolder(Folder):
    """A folder of a POSIX file system."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._maps: dict[str, memoryview] = {}
        self.url = str(path)

    def sub(self, name: str) -> LocalFolder:
        """The folder of that name inside."""
        return LocalFolder(self._path / name)

    def make(self) -> None:
        """Create it and its missing parents, each durable in its own parent."""
        missing = [self._path]
        while not (parent := missing[-1].parent).is_dir():
            missing.append(parent)
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            _sync_folder(path.parent)  # also where another writer made it: it may not have come to this yet

    def names(self) -> list[str]:
        """Names of what is inside, sorted."""
        try:
            return sorted(os.listdir(self._path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def linked(self, name: str) -> bool:
        """True for a symbolic link."""
        return os.path.islink(self._path / name)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return os.stat(self._path / name, follow_symlinks=False).st_size

    def range(self, name: str, start: int, length: int) -> memoryview:
        """A part of a file, as a view of its mapped pages."""
        if name not in self._maps:
            with self._opened(name) as stream:
                size = os.fstat(stream.fileno()).st_size
                mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) if size else b""
                self._maps[name] = memoryview(mapped)
        return self._maps[name][start : start + length]

    def publish(self, name: str, data: bytes) -> None:
        """Write under a temporary name, then rename; each made durable before the next."""
        draft = f"{name}.tmp"
        try:
            self._store(draft, [data])
            # The names of the files that this one speaks of: a loss of power may keep a later name and drop theirs.
            _sync_folder(self._path)
            os.rename(self._path / draft, self._path / name)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                os.unlink(self._path / draft)
            raise
        _sync_folder(self._path)

    def touch(self, name: str, data: bytes) -> None:
        """Change its time of modification, and nothing else."""
        os.utime(self._path / name, follow_symlinks=False)

    def stamp(self, name: str) -> str:
        """Its inode and its time of modification: by whatever clock, for only changes count."""
        found = os.stat(self._path / name, follow_symlinks=False)
        return f"{found.st_ino} {found.st_mtime_ns}"

    def delete(self, name: str) -> None:
        """Unlink a file if it is there, and make that durable."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path / name)
            _sync_folder(self._path)

    def remove(self) -> None:
        """Unlink the files and the folder."""
        for name in self.names():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path / name)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self._path)

    def _store(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._path / name, flags, 0o666)
        try:
            for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            # A failed fsync marks the pages clean: asking again would say yes and prove nothing. It fails the file.
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        # NONBLOCK: a pipe in place of a file must not hang the reader.
        descriptor = os.open(self._path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointDamaged(f"{self.url}/{name} is not a regular file")
            yield stream


class RemoteFolder(Folder):
    """A folder of any fsspec file system; one put is whole or not there, as object stores promise."""

    def __init__(self, url: str) -> None:
        import fsspec  # here: local checkpoints do without it

        self.url = url.rstrip("/")
        self._system, self._path = fsspec.core.url_to_fs(self.url)

    def sub(self, name: str) -> RemoteFolder:
        """The folder of that name inside."""
        return RemoteFolder(f"{self.url}/{name}")

    def make(self) -> None:
        """Create it, where the store has folders at all."""
        self._system.makedirs(self._path, exist_ok=True)

    def names(self) -> list[str]:
        """Names of what is inside, sorted."""
        self._system.invalidate_cache()  # another machine may have written since
        try:
            entries = self._system.ls(self._path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({entry.rstrip("/").rpartition("/")[2] for entry in entries} - {""})

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return int(self._system.size(f"{self._path}/{name}"))

    def range(self, name: str, start: int, length: int) -> memoryview:
        """A part of a file, fetched."""
        if not length:
            return memoryview(b"")
        return memoryview(self._system.cat_file(f"{self._path}/{name}", start=start, end=start + length))

    def publish(self, name: str, data: bytes) -> None:
        """Write a file by one put."""
        self._system.pipe_file(f"{self._path}/{name}", data)

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(f"{self._path}/{name}")

    def remove(self) -> None:
        """Delete everything under the folder's name."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(self._path, recursive=True)

    def _store(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        with self._system.open(f"{self._path}/{name}", "wb") as stream:
            for chunk in chunks:
                stream.write(chunk)

    def _opened(self, name: str) -> AbstractContextManager[BinaryIO]:
        stream: AbstractContextManager[BinaryIO] = self._system.open(f"{self._path}/{name}", "rb")
        return stream


def _sha256(chunks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot: their names are durable at once, or never
            raise
    finally:
        os.close(descriptor)
