"""How an agent sees that its ranks get on: each writes what it is doing into memory that both share.

A beat is a few stores into that memory: no system call and no clock. The agent notes when it saw a change.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

_BEATS, _PHASE, _STEP, _FINISHED, _BEGAN, _SAVED, _ASKED = range(7)
_SLOT_NUMBERS = 8  # one cache line a rank
_SLOT_BYTES = 8 * _SLOT_NUMBERS
_NONE = -1
_NAME = "unitrain-heartbeats"


class Phase(IntEnum):
    """What a rank is doing; a step has another deadline than an evaluation."""

    STARTING = 0
    STEP = 1
    EVALUATING = 2
    SAVING = 3
    FINISHING = 4


class Pulse(NamedTuple):
    """What a rank has told by its last beat."""

    beats: int  # 0: none yet
    phase: Phase
    step: int
    finished: int  # steps of this attempt
    began: int | None  # step from which the attempt goes on, once it is known
    saved: int | None  # newest step that this attempt has made durable


class Heartbeat:
    """A rank's own slot. One thread beats; another may tell what is saved."""

    def __init__(self, slot: memoryview) -> None:
        self._slot = slot
        self._beats = 0
        self._finished = 0

    @staticmethod
    @functools.cache  # several worlds of one process, one mapping
    def of(text: str) -> Heartbeat:
        """The slot that `Heartbeats.place` described."""
        fd, _, number = text.partition(":")
        return Heartbeat(_slot(mmap.mmap(int(fd), 0), int(number)))

    def beat(self, phase: Phase, step: int) -> None:
        """This rank is in that phase, at that step."""
        slot = self._slot
        slot[_PHASE], slot[_STEP] = phase, step
        self._beats += 1
        slot[_BEATS] = self._beats

    def again(self) -> None:
        """This rank still does what it has last told, and knows that it gets on."""
        self._beats += 1
        self._slot[_BEATS] = self._beats

    def finished(self) -> None:
        """One more step is done."""
        self._finished += 1
        self._slot[_FINISHED] = self._finished

    def began(self, step: int) -> None:
        """The attempt goes on from this step."""
        self._slot[_BEGAN] = step

    def saved(self, step: int) -> None:
        """The checkpoint of this step is durable, or its snapshot outlives this rank."""
        self._slot[_SAVED] = max(step, self._slot[_SAVED])

    @property
    def asked_to_leave(self) -> bool:
        """True when the agent wants to go on with another number of ranks."""
        return bool(self._slot[_ASKED])


class Heartbeats:
    """The slots of all ranks of one node, in memory of the agent's that has no name."""

    def __init__(self, ranks: int) -> None:
        self.fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, ranks * _SLOT_BYTES)
        self._memory = mmap.mmap(self.fd, ranks * _SLOT_BYTES)
        self._slots = [_slot(self._memory, number) for number in range(ranks)]
        for slot in self._slots:
            slot[_BEGAN] = slot[_SAVED] = _NONE

    @classmethod
    def of_agent(cls, pid: int) -> Heartbeats | None:
        """The same memory, as another process of the same user may look at it; None where that agent holds none."""
        fd = _shown(f"/proc/{pid}/fd")
        if fd is None:
            return None
        seen = cls.__new__(cls)
        seen.fd = fd
        num_bytes = os.fstat(fd).st_size
        seen._memory = mmap.mmap(fd, num_bytes, access=mmap.ACCESS_READ)
        seen._slots = [_slot(seen._memory, number) for number in range(num_bytes // _SLOT_BYTES)]
        return seen

    def pulse(self, number: int) -> Pulse:
        """What the rank of that slot has told."""
        slot = self._slots[number]
        beats = slot[_BEATS]  # first: what it counts has been written before it
        began, saved = slot[_BEGAN], slot[_SAVED]
        return Pulse(
            beats=beats,
            phase=Phase(slot[_PHASE]),
            step=slot[_STEP],
            finished=slot[_FINISHED],
            began=None if began == _NONE else began,
            saved=None if saved == _NONE else saved,
        )

    def ask_to_leave(self) -> None:
        """Let every rank know that it should save and leave, for another number of ranks to go on."""
        for slot in self._slots:
            slot[_ASKED] = 1

    def close(self) -> None:
        """Give up the memory; ranks that still hold it harm nobody."""
        for slot in self._slots:
            slot.release()
        self._memory.close()
        os.close(self.fd)


def _slot(memory: mmap.mmap, number: int) -> memoryview:
    numbers = memoryview(memory).cast("q")
    return numbers[number * _SLOT_NUMBERS : (number + 1) * _SLOT_NUMBERS]


def _shown(folder: str) -> int | None:
    """A descriptor of the memory, to read only, from what the kernel shows of a process that holds it."""
    with contextlib.suppress(OSError):  # the process has just ended
        for link in Path(folder).iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has just closed that one
                if f"memfd:{_NAME} " in os.readlink(link):
                    return os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    return None
