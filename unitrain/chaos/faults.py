"""Faults by name: when each comes, what it does to a run from outside, and when the run has survived it."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..checkpoint import open_newest

if TYPE_CHECKING:
    from .drill import Drill
    from .watch import Sight

Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fault(ABC):
    """One thing that goes wrong, once."""

    option: ClassVar[str]  # of the command line
    example: ClassVar[str]

    @abstractmethod
    def due(self, sight: Sight, saves: int) -> bool:
        """True when it is to happen, from what is seen of the run; `saves` have ended so far."""

    @abstractmethod
    def inject(self, drill: Drill, sight: Sight) -> str:
        """Do it; in words, what was done."""

    def before_resume(self, drill: Drill) -> str:
        """What it does to a run that has ended with exit code 75; in words, empty for nothing."""
        return ""

    def complaint(self, drill: Drill, since: Sequence[Event]) -> str:
        """What is wrong about how the run went on, although it did, from its events since; empty for nothing."""
        return ""

    @property
    def keeps_running(self) -> bool:
        """True when no rank ends by it."""
        return False


@dataclass(frozen=True, kw_only=True)
class _AtStep(Fault):
    step: int  # optimizer steps that are done by then

    def due(self, sight: Sight, saves: int) -> bool:
        """As soon as the rank that it meets has done that many steps."""
        pulse = sight.pulses.get(getattr(self, "rank", 0))
        return pulse is not None and pulse.step >= self.step and pulse.began is not None


@dataclass(frozen=True, kw_only=True)
class Kill(_AtStep):
    """A rank ends without a word: out of memory, a broken node."""

    option: ClassVar[str] = "kill"
    example: ClassVar[str] = "rank=1,step=7"
    rank: int

    def inject(self, drill: Drill, sight: Sight) -> str:
        """SIGKILL to the rank."""
        os.kill(sight.pids[self.rank], signal.SIGKILL)
        return f"rank {self.rank} killed"

    def __str__(self) -> str:
        return f"kill rank={self.rank},step={self.step}"


@dataclass(frozen=True, kw_only=True)
class Stop(_AtStep):
    """A rank gets on no more: a dead device, a lost file server."""

    option: ClassVar[str] = "stop"
    example: ClassVar[str] = "rank=0,step=15"
    rank: int

    def inject(self, drill: Drill, sight: Sight) -> str:
        """SIGSTOP to the rank."""
        os.kill(sight.pids[self.rank], signal.SIGSTOP)
        return f"rank {self.rank} stopped"

    def complaint(self, drill: Drill, since: Sequence[Event]) -> str:
        """A hang must be told as one."""
        hung = [event["rank"] for event in since if event["event"] == "hang"]
        return "" if hung == [self.rank] else f"no event names rank {self.rank} as hung"

    def __str__(self) -> str:
        return f"stop rank={self.rank},step={self.step}"


@dataclass(frozen=True, kw_only=True)
class Sigterm(_AtStep):
    """A scheduler wants the machine back."""

    option: ClassVar[str] = "sigterm"
    example: ClassVar[str] = "step=12"

    def inject(self, drill: Drill, sight: Sight) -> str:
        """SIGTERM to the agent."""
        drill.process.send_signal(signal.SIGTERM)
        return "run told to stop"

    def before_resume(self, drill: Drill) -> str:
        """Nothing: it is resumed as it is."""
        return "resumed"

    def __str__(self) -> str:
        return f"sigterm step={self.step}"


@dataclass(frozen=True, kw_only=True)
class Corrupt(Sigterm):
    """A disk gives back other bytes than it was given."""

    option: ClassVar[str] = "corrupt"
    example: ClassVar[str] = "newest,step=20"

    def before_resume(self, drill: Drill) -> str:
        """Flip one bit in the largest file of the newest sound checkpoint."""
        reader = open_newest(drill.checkpoints).reader
        assert reader is not None, "a run that ended with 75 has saved"
        drill.damaged = reader.folder
        file = max(Path(reader.folder).glob("part-*.safetensors"), key=lambda path: path.stat().st_size)
        with file.open("r+b") as stream:
            place = file.stat().st_size - 1
            stream.seek(place)
            byte = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([byte ^ 1]))
        return f"one bit of the checkpoint of step {reader.step} flipped, resumed"

    def complaint(self, drill: Drill, since: Sequence[Event]) -> str:
        """It must have been passed over, and named."""
        named = {event["folder"] for event in since if event["event"] == "checkpoint_damaged"}
        return "" if drill.damaged in named else f"no event names {drill.damaged} as damaged"

    def __str__(self) -> str:
        return f"corrupt newest,step={self.step}"


@dataclass(frozen=True, kw_only=True)
class FullDisk(Fault):
    """The disk is full while a checkpoint is written."""

    option: ClassVar[str] = "enospc"
    example: ClassVar[str] = "save=2"
    save: int  # counted from 1, over all attempts

    @property
    def keeps_running(self) -> bool:
        """A failed save is no failed run."""
        return True

    def due(self, sight: Sight, saves: int) -> bool:
        """As soon as the save before it has ended."""
        return saves >= self.save - 1 and any(pulse.began is not None for pulse in sight.pulses.values())

    def inject(self, drill: Drill, sight: Sight) -> str:
        """Fill the disk of the checkpoints."""
        drill.disk.fill()
        return "disk filled"

    def __str__(self) -> str:
        return f"enospc save={self.save}"


KINDS: tuple[type[Fault], ...] = (Kill, Sigterm, Stop, Corrupt, FullDisk)
