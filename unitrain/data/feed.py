"""Batches of a source in the cursor's order, loaded in the background ahead of the step that takes them."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batch import Batch, MicroBatch, Origin
from ..cursor import Window, even_parts, micro_rows, mix, num_microbatches, rank_rows, sample_ids
from ..errors import DataError, UnitrainError
from .source import Source, unreadable

Place = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, Any]]

_SWEEP = 0x53574545  # keeps the keys of evaluation apart from those of training
_CLOSE_SECONDS = 2.0  # a source that answers no more is left behind after this long


class Feed:
    """This rank's share of each global batch. One thread loads; one other thread takes.

    `place` turns host arrays into the framework's, in the loading thread. With `even`, micro-batches have as many rows
    on every rank. A source that fails is reported by `Batch.micro()`, as a DataError that names the sample. With
    `elsewhere` nothing is loaded unless somebody asks: the ranks fetch their rows where they are.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int | None,
        rank: int,
        size: int,
        place: Place,
        even: bool = False,
        ahead: int = 2,
        elsewhere: bool = False,
    ) -> None:
        self._num_samples = len(source)
        if not self._num_samples:
            raise DataError(f"{source!r} has no samples; give data with at least one")
        self._source = source
        self._portion = Portion(source, micro_batch=micro_batch, rank=rank, size=size, place=place, even=even)
        self._tokens_per_sample = source.tokens_per_sample  # here, where a mistake in a source is told at once
        self._seed, self._global_batch = seed, global_batch
        self._ahead, self._elsewhere = ahead, elsewhere
        self._wanted: SimpleQueue[tuple[_Reader, int] | None] = SimpleQueue()
        self._skipped: tuple[Window, ...] = ()
        self._training = _Reader(self._training_ids(), (seed,))
        self._next_step: int | None = None
        self._loading: _Loaded | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._load_wanted, name="unitrain-feed", daemon=True)
        self._thread.start()

    def batch(self, step: int) -> Batch:
        """The training batch of that step; the next ones are loaded behind it. Any step costs the same."""
        if self._elsewhere:
            self._check_open()
            return self._unloaded(self._training_ids()(step), step, (self._seed,))
        if step != self._next_step:
            self._seek(step)
        self._wanted.put((self._training, step + self._ahead))
        self._next_step = step + 1
        return self._training.ready.get()

    def skip(self, windows: Sequence[Window]) -> None:
        """Leave these positions of the sample order out, from the next batch on."""
        self._skipped = tuple(windows)
        self._next_step = None  # what is loaded ahead may be other samples

    def sweep(self, limit: int | None = None) -> Iterator[Batch]:
        """Every sample once, in order, in global batches, of which the last may be short; at most `limit` batches."""
        self._check_open()
        num_batches = -(-self._num_samples // self._global_batch)
        num_batches = num_batches if limit is None else min(num_batches, limit)
        reader = _Reader(self._sweep_ids, (self._seed, _SWEEP))
        if self._elsewhere:
            yield from (self._unloaded(reader.ids(number), number, reader.key) for number in range(num_batches))
            return
        try:
            for number in range(min(self._ahead, num_batches)):
                self._wanted.put((reader, number))
            for number in range(num_batches):
                if number + self._ahead < num_batches:
                    self._wanted.put((reader, number + self._ahead))
                yield reader.ready.get()
        finally:
            reader.gone = True

    def close(self) -> None:
        """Stop loading. Returns within seconds even if the source never does."""
        self._closed = True
        self._next_step = None
        self._training.gone = True
        self._wanted.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive() and self._loading is not None:
            self._loading.fail(DataError(f"the feed was closed while {self._source!r} was still reading"))

    def _seek(self, step: int) -> None:
        self._check_open()
        self._training.gone = True
        self._training = _Reader(self._training_ids(), (self._seed,))
        for number in range(step, step + self._ahead):
            self._wanted.put((self._training, number))

    def _check_open(self) -> None:
        if self._closed:
            raise DataError(f"the feed of {self._source!r} is closed; make a new one")

    def _training_ids(self) -> Callable[[int], NDArray[np.int64]]:
        """step -> ids, with the windows that are skipped by now."""
        size, batch, skipped = self._num_samples, self._global_batch, self._skipped
        return functools.partial(_ids_of_step, self._seed, batch, size, skipped)

    def _sweep_ids(self, number: int) -> NDArray[np.int64]:
        begin = number * self._global_batch
        return np.arange(begin, min(begin + self._global_batch, self._num_samples), dtype=np.int64)

    def _load_wanted(self) -> None:
        """The loading thread: each batch is handed over with its ids at once, and filled behind."""
        while (wanted := self._wanted.get()) is not None:
            reader, step = wanted
            if reader.gone or self._closed:
                continue
            ids = reader.ids(step)
            self._loading = loaded = _Loaded()
            reader.ready.put(self._batch(ids, step, reader.key, loaded.take))
            try:
                loaded.fill(self._portion.micro_batches(ids, (*reader.key, step)))
            except BaseException as error:  # whatever it is, the thread that waits must hear of it
                loaded.fail(error)

    def _unloaded(self, ids: NDArray[np.int64], step: int, key: tuple[int, ...]) -> Batch:
        return self._batch(ids, step, key, lambda: self._portion.micro_batches(ids, (*key, step)))

    def _batch(
        self, ids: NDArray[np.int64], step: int, key: tuple[int, ...], load: Callable[[], Sequence[MicroBatch]]
    ) -> Batch:
        tokens = len(ids) * self._tokens_per_sample
        return Batch(step, ids, load, tokens=tokens, origin=Origin(self._source, (*key, step)))


class Portion:
    """One rank's share of any global batch of a source."""

    def __init__(
        self, source: Source, *, micro_batch: int | None, rank: int, size: int, place: Place, even: bool = False
    ) -> None:
        self._source, self._place = source, place
        self._micro_batch, self._rank, self._size, self._even = micro_batch, rank, size, even

    def micro_batches(self, ids: NDArray[np.int64], key: tuple[int, ...]) -> list[MicroBatch]:
        """The micro-batches of this rank in a global batch of these samples. Raises DataError, naming a sample."""
        if self._even:
            parts = even_parts(len(ids), self._rank, self._size, self._micro_batch)
        else:
            rows = rank_rows(len(ids), self._rank, self._size)
            shares = micro_rows(rows, num_microbatches(len(ids), self._size, self._micro_batch))
            parts = [(share, not share) for share in shares]
        return [self._micro(ids, part, mix(*key, part.start), filler) for part, filler in parts]

    def _micro(self, ids: NDArray[np.int64], part: range, key: int, filler: bool) -> MicroBatch:
        """Those rows of the global batch; its first row as a filler where the part is empty."""
        chosen = ids[part.start : part.stop] if part else ids[:1]
        arrays = self._fetch(chosen)
        try:
            placed = self._place(arrays)
        except UnitrainError:
            raise
        except Exception as error:
            found = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
            raise DataError(
                f"samples of {self._source!r} could not be moved to the device: {type(error).__name__}: {error}; "
                f"they are {found}"
            ) from error
        return MicroBatch(placed, len(chosen), key, filler=filler)

    def _fetch(self, ids: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        try:
            arrays = self._source.fetch(ids)
        except Exception as error:
            if isinstance(error, UnitrainError) and _named_samples(error).intersection(ids.tolist()):
                raise
            raise self._explained(error, ids) from error
        if not isinstance(arrays, Mapping) or not arrays:
            raise DataError(f"{self._source!r} fetched a {type(arrays).__name__}; fetch must return named arrays")
        for name, array in arrays.items():
            if array.shape[:1] != ids.shape:
                raise DataError(
                    f"{self._source!r} fetched {name!r} of shape {array.shape} for {len(ids)} samples; "
                    "fetch must return one row for each id"
                )
        return arrays

    def _explained(self, error: Exception, ids: NDArray[np.int64]) -> DataError:
        """The same failure with the sample that causes it, found by fetching them one by one."""
        for number in ids.tolist():
            try:
                self._source.fetch(np.array([number], dtype=np.int64))
            except Exception as alone:
                return unreadable(self._source, number, alone)
        return DataError(
            f"samples {', '.join(map(str, ids[:8].tolist()))}{', ...' if len(ids) > 8 else ''} of {self._source!r} "
            f"could not be fetched together: {type(error).__name__}: {error}; each of them alone can be, so they "
            "differ in shape, or the failure has passed"
        )


class _Reader:
    """Somebody who takes batches one after the other: which ids each has, and where they arrive."""

    def __init__(self, ids: Callable[[int], NDArray[np.int64]], key: tuple[int, ...]) -> None:
        self.ids = ids
        self.key = key
        self.ready: SimpleQueue[Batch] = SimpleQueue()
        self.gone = False


class _Loaded:
    """The micro-batches of one batch once they are there, or the error instead."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._micro: Sequence[MicroBatch] = ()
        self._error: BaseException | None = None

    def take(self) -> Sequence[MicroBatch]:
        """Wait, then return or raise."""
        if not self._done.is_set():  # most often it is, and wait() costs five calls more
            self._done.wait()
        if self._error is not None:
            raise self._error
        return self._micro

    def fill(self, micro: Sequence[MicroBatch]) -> None:
        self._micro = micro
        self._done.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._done.set()


def _ids_of_step(seed: int, global_batch: int, size: int, skipped: Sequence[Window], step: int) -> NDArray[np.int64]:
    return sample_ids(seed, step, global_batch, size, skipped)


def _named_samples(error: Exception) -> set[int]:
    """Numbers that the message gives as samples."""
    return {int(number) for number in re.findall(r"\bsample (\d+)", str(error))}
