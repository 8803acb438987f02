"""Whenever a save is cut off, the previous checkpoint or the new one loads bit for bit: never neither, never a mixture.

Cut off by kill -9 of real processes, at every file operation, by a loss of power that drops, tears and reorders
whatever was not made durable, and by storage that fails or fills up.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unitrain.checkpoint import CheckpointReader, Saver, SaveReport, files, list_checkpoints, open_newest, take_over
from unitrain.checkpoint.fence import OWNER
from unitrain.errors import CheckpointError
from unitrain.strategy import Shard

WRITERS = 2


def values(step: int, size: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(size)


def savers(root: Path, nonce: str, **changes: Any) -> list[Saver]:
    options: dict[str, Any] = {
        "keep": 1,
        "asynchronous": False,
        "producer": {},
        "report": lambda report: None,
        **changes,
    }
    return [Saver(str(root), writer=writer, writers=WRITERS, nonce=nonce, **options) for writer in range(WRITERS)]


def save(writers: Sequence[Saver], step: int, size: int = 500) -> None:
    """Save half of a tensor with each writer; writer 0 comes last, so that it need not wait."""
    half = size // 2
    for writer, saver in reversed(list(enumerate(writers))):
        data = values(step, size)[writer * half : writer * half + half]
        saver.save(step, {"model": [Shard("w", "param", "float64", (size,), (writer * half,), data)]}, {"step": step})


def loaded_step(root: Path, size: int = 500) -> int:
    """Load the newest checkpoint, all of it, and compare every byte."""
    reader, passed_over = open_newest(str(root))
    assert reader is not None, passed_over
    assert (passed_over, list_checkpoints(str(root)).damaged) == ([], []), "half of a checkpoint is none"
    assert reader.state == {"step": reader.step}
    np.testing.assert_array_equal(reader.role("model").read("param", "w", (0,), (size,)), values(reader.step, size))
    return reader.step


class Crash(BaseException):
    """The process ends here."""


class Disk:
    """Stands where `files` has `os`: notes each operation that changes the disk, and may fail one or end at one."""

    CHANGES = ("mkdir", "create", "write", "fsync", "rename", "unlink", "rmdir")

    def __init__(
        self, *, crash_at: int | None = None, fail_at: int | None = None, error: int = 0, reads: bool = False
    ) -> None:
        self.log: list[tuple[Any, ...]] = []
        self._reads = reads  # count what only looks at the disk as well
        self._meet_at: int | None = None
        self._crash_at, self._fail_at, self._error = crash_at, fail_at, error
        self._open: dict[int, tuple[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def meet(self, at: int, meeting: Callable[[], None]) -> Disk:
        """Let something else happen before an operation."""
        self._meet_at, self._meeting = at, meeting
        return self

    def _note(self, *operation: Any) -> None:
        if self._crash_at is not None and len(self.log) >= self._crash_at:
            raise Crash
        if len(self.log) == self._meet_at:
            self._meet_at = None
            self._meeting()
        self.log.append(operation)
        if len(self.log) - 1 == self._fail_at:
            raise OSError(self._error, os.strerror(self._error))

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        creates = bool(flags & os.O_CREAT)
        if creates:
            self._note("create", str(path))
        elif self._reads:
            self._note("open", str(path))
        descriptor = os.open(path, flags, mode)
        self._open[descriptor] = ("file" if creates else "folder", str(path))
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        piece = bytes(data[: max(len(data) // 2, 1)])  # short writes are legal, and more places to crash
        self._note("write", self._open[descriptor][1], piece)
        return os.write(descriptor, piece)

    def fsync(self, descriptor: int) -> None:
        kind, path = self._open[descriptor]
        self._note("fsync", kind, path)  # done for real it would only cost time: what it promises is modelled below

    def listdir(self, path: Any) -> list[str]:
        if self._reads:
            self._note("listdir", str(path))
        return os.listdir(path)

    def stat(self, path: Any, **options: Any) -> os.stat_result:
        if self._reads:
            self._note("stat", str(path))
        return os.stat(path, **options)

    def rename(self, old: Any, new: Any) -> None:
        self._note("rename", str(old), str(new))
        os.rename(old, new)

    def unlink(self, path: Any) -> None:
        self._note("unlink", str(path))
        os.unlink(path)

    def mkdir(self, path: Any) -> None:
        self._note("mkdir", str(path))
        os.mkdir(path)

    def rmdir(self, path: Any) -> None:
        self._note("rmdir", str(path))
        os.rmdir(path)


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A root with the checkpoint of step 1."""
    save(savers(tmp_path / "before", "before"), 1)
    return tmp_path / "before"


def told(capsys: pytest.CaptureFixture[str], sentence: str) -> None:
    """Figures of a drill, also where output is captured."""
    with capsys.disabled():
        print(f"\n{sentence}")


def saved_on(disk: Disk, root: Path, nonce: str, step: int, **changes: Any) -> list[Saver]:
    """The writers of one save to a disk that watches it."""
    writers = savers(root, nonce, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "os", disk)
        save(writers, step)
    return writers


def operations_of_one_save(before: Path) -> list[tuple[Any, ...]]:
    disk, root = Disk(), before.parent / "whole"
    shutil.copytree(before, root)
    saved_on(disk, root, "after", 2)
    assert {operation[0] for operation in disk.log} == set(Disk.CHANGES)
    return disk.log


def test_a_crash_at_any_operation_leaves_the_previous_or_the_new_checkpoint(tmp_path: Path, before: Path) -> None:
    count = len(operations_of_one_save(before))
    found = set()
    for number in range(count):
        root = tmp_path / str(number)
        shutil.copytree(before, root)
        with pytest.raises(Crash):
            saved_on(Disk(crash_at=number), root, "after", 2)
        found.add(loaded_step(root))
        saved_on(Disk(), root, "again", 3)  # the next attempt needs no repair, and tidies up
        assert loaded_step(root) == 3
        assert os.listdir(root) == ["s00000003-again"]
    assert found == {1, 2}
    assert count > 40


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_failure_of_any_operation_leaves_the_previous_or_the_new_checkpoint(
    tmp_path: Path, before: Path, error: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every call in turn: open, write, fsync of files and folders, rename, mkdir, unlink, rmdir, listdir, stat."""
    failures, whole = 0, Disk(reads=True)
    shutil.copytree(before, tmp_path / "counted")
    saved_on(whole, tmp_path / "counted", "after", 2)
    assert {operation[0] for operation in whole.log} == {*Disk.CHANGES, "open", "listdir", "stat"}
    for number in range(len(whole.log)):
        root, reports = tmp_path / str(number), list[SaveReport]()
        shutil.copytree(before, root)
        disk = Disk(fail_at=number, error=error, reads=True)
        writers = saved_on(disk, root, "after", 2, report=reports.append, patience_seconds=0.0)
        published = reports[-1].ok
        failures += not published
        # Where it cannot be known any more whether another attempt has taken over, nothing is deleted.
        uncertain = "may not count" in (reports[-1].error or "")
        assert loaded_step(root) == (2 if published or uncertain else 1)
        assert any(os.strerror(error) in (report.error or "") for report in reports), "a failure is told"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "os", Disk())
            save(writers, 3)
        assert loaded_step(root) == 3
        assert len(os.listdir(root)) <= 2
    assert failures > 20
    name = errno.errorcode[error]
    told(capsys, f"{name} at each of {len(whole.log)} calls of a save: {failures} failed and were told, 0 lost")


@pytest.mark.parametrize("saves", [False, True])
def test_an_attempt_that_is_replaced_before_any_call_of_its_save_does_no_harm(
    tmp_path: Path, before: Path, saves: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It slept there. The new attempt has taken over, and in the second case has saved, when it wakes up."""
    take_over(str(before), "old")
    whole = Disk(reads=True)
    shutil.copytree(before, tmp_path / "counted")
    saved_on(whole, tmp_path / "counted", "old", 2)
    seen = 0
    for number in range(len(whole.log)):
        root, found = tmp_path / str(number), list[int]()
        shutil.copytree(before, root)

        def replaced(root: Path = root, found: list[int] = found) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files, "os", os)
                take_over(str(root), "new")
                found.append(loaded_step(root))
                if saves:
                    save(savers(root, "new"), 3)

        with contextlib.suppress(CheckpointError):
            saved_on(Disk(reads=True).meet(number, replaced), root, "old", 2, patience_seconds=0.0)
        step = loaded_step(root)
        assert step == 3 if saves else step >= found[0], "what the new attempt has seen or saved stays"
        assert (root / OWNER).read_text() == "new"
        seen += found[0] == 2
        save(savers(root, "new"), 4)
        assert loaded_step(root) == 4
        assert sorted(os.listdir(root)) == [OWNER, "s00000004-new"]
        shutil.rmtree(root)
    assert 0 < seen < len(whole.log)
    told(capsys, f"replaced before each of {len(whole.log)} calls of a save: 0 lost, 0 mixtures, 0 damaged")


class Durable:
    """What a disk holds after a loss of power, by the rules of POSIX.

    A file's bytes are safe after fsync of the file, its name after fsync of the folder. All else may be there, be
    absent, be torn, or be zeros; changes of names may be kept and lost in any combination.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.data: dict[int, bytes] = {}  # all that was written, by file
        self.safe: dict[int, bytes] = {}  # what survives
        self.names: dict[str, dict[str, int | None]] = {}  # folder -> name -> file, None for a folder
        self.loose: dict[str, list[tuple[Any, ...]]] = {}  # folder -> changes of names that may be lost
        self.now: dict[str, int] = {}  # path -> file
        for folder, folders, names in os.walk(root):
            self.names[folder], self.loose[folder] = dict.fromkeys(folders), []
            for name in names:
                self._create(f"{folder}/{name}", Path(folder, name).read_bytes())
                self.names[folder][name] = self.now[f"{folder}/{name}"]
        self.safe = dict(self.data)

    def _create(self, path: str, data: bytes = b"") -> int:
        self.now[path] = number = len(self.data)
        self.data[number] = data
        return number

    def apply(self, operation: tuple[Any, ...]) -> None:
        kind, *facts = operation
        folder, _, name = facts[-1 if kind != "write" else 0].rpartition("/")
        if kind == "mkdir":
            if facts[0] not in self.names:
                self.names[facts[0]], self.loose[facts[0]] = {}, []
                self.loose[folder].append(("set", name, None))
        elif kind == "create":
            self.loose[folder].append(("set", name, self._create(facts[0])))
        elif kind == "write":
            self.data[self.now[facts[0]]] += facts[1]
        elif kind == "fsync" and facts[0] == "file":
            self.safe[self.now[facts[1]]] = self.data[self.now[facts[1]]]
        elif kind == "fsync":
            self.names[facts[1]] = self._kept(facts[1], frozenset())
            self.loose[facts[1]] = []
        elif kind == "rename":
            self.now[facts[1]] = self.now.pop(facts[0])
            self.loose[folder].append(("move", facts[0].rpartition("/")[2], name, self.now[facts[1]]))
        elif kind == "unlink":
            del self.now[facts[0]]
            self.loose[folder].append(("drop", name))
        elif kind == "rmdir":
            self.loose[folder].append(("drop", name))

    def losses(self) -> Iterator[frozenset[tuple[str, int]]]:
        """Every combination of changes of names that a loss of power may undo."""
        changes = [(folder, place) for folder, loose in self.loose.items() for place in range(len(loose))]
        for count in range(len(changes) + 1):
            yield from map(frozenset, itertools.combinations(changes, count))

    def _kept(self, folder: str, lost: frozenset[tuple[str, int]]) -> dict[str, int | None]:
        """Names in a folder without the changes that are lost."""
        names = dict(self.names[folder])
        for place, (kind, name, *rest) in enumerate(self.loose[folder]):
            if (folder, place) in lost:
                continue
            if kind == "set":
                names[name] = rest[0]
            else:
                names.pop(name, None)
                if kind == "move":
                    names[rest[0]] = rest[1]
        return names

    def write_out(
        self, to: Path, lost: frozenset[tuple[str, int]], chance: random.Random, folder: str | None = None
    ) -> None:
        """The state that remains without some changes of names, and with whatever chance leaves of unsafe bytes."""
        folder = folder or self.root
        to.mkdir(parents=True)
        for name, number in self._kept(folder, lost).items():
            if number is None:
                self.write_out(to / name, lost, chance, f"{folder}/{name}")
            else:
                (to / name).write_bytes(self._survived(number, chance))

    def _survived(self, number: int, chance: random.Random) -> bytes:
        data, safe = self.data[number], self.safe.get(number, b"")
        if data == safe:
            return safe
        torn = chance.randrange(len(data) + 1)
        zeros = bytes(len(data) - torn)
        return chance.choice((safe, data, data[:torn], data[:torn] + zeros, zeros + data[len(data) - torn :]))


def test_a_loss_of_power_at_any_operation_leaves_the_previous_or_the_new_checkpoint(
    tmp_path: Path, before: Path, full_drills: bool
) -> None:
    durable, disk = Durable(before), Disk()
    saved_on(disk, before, "after", 2)
    acknowledged = 1 + max(
        number for number, (kind, *facts) in enumerate(disk.log)
        if kind == "fsync" and facts == ["folder", str(before / "s00000002-after")]
        and any(operation[0] == "rename" and "MANIFEST" in operation[2] for operation in disk.log[:number])
    )  # fmt: skip
    chance, found = random.Random(0), set()
    for number, operation in enumerate(disk.log, 1):
        durable.apply(operation)
        for sample, lost in enumerate([*durable.losses()] * (20 if full_drills else 1)):
            state = tmp_path / f"{number}-{sample}"
            durable.write_out(state, lost, chance)
            step = loaded_step(state)
            assert step == 2 or number < acknowledged, "what was published must survive"
            found.add(step)
    assert found == {1, 2}
    assert acknowledged < len(disk.log), "deleting the previous one comes after"


def test_after_a_loss_of_power_at_random_in_random_saves_nothing_is_lost_or_mixed(
    tmp_path: Path, full_drills: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names lost and kept in any combination, bytes torn; other sizes of files, numbers kept, saves before."""
    chance = random.Random(0 if full_drills else time.time_ns())
    found, points = dict.fromkeys(("previous", "new"), 0), 1000 if full_drills else 60
    for number in range(points // 20):
        root, earlier = tmp_path / f"{number}", chance.randint(1, 3)
        options = {"keep": chance.randint(1, 3), "file_bytes": chance.choice([600, 2000, 1 << 20])}
        for step in range(1, earlier + 1):
            save(savers(root, f"attempt{step}", **options), step)
        durable, disk, done = Durable(root), Disk(), 0
        saved_on(disk, root, "after", earlier + 1, **options)
        published = next(n for n, op in enumerate(disk.log) if op[0] == "rename" and "MANIFEST" in op[2])
        durably = next(n for n, op in enumerate(disk.log) if n > published and op[:2] == ("fsync", "folder"))
        for point, cut in enumerate(sorted(chance.choices(range(len(disk.log) + 1), k=20))):
            for operation in disk.log[done:cut]:
                durable.apply(operation)
            done = cut
            state = tmp_path / f"{number}-{point}"
            changes = [(folder, place) for folder, loose in durable.loose.items() for place in range(len(loose))]
            durable.write_out(state, frozenset(chance.sample(changes, chance.randint(0, len(changes)))), chance)
            step = loaded_step(state)
            assert step == earlier + 1 or (step == earlier and cut <= durably), f"cut {cut} of {len(disk.log)}"
            found["new" if step > earlier else "previous"] += 1
            shutil.rmtree(state)
        shutil.rmtree(root)
    assert min(found.values()) > 0
    told(capsys, f"{points} crash points: {found['previous']} previous, {found['new']} new, 0 lost, 0 mixtures")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_model_of_power_loss_catches_a_save_that_does_not_sync(tmp_path: Path, before: Path, kind: str) -> None:
    """The drill above must be able to fail: without fsync of files, or of folders, it does."""
    durable, disk = Durable(before), Disk()
    saved_on(disk, before, "after", 2)
    for operation in disk.log:
        if operation[:2] != ("fsync", kind):
            durable.apply(operation)
    chance, lost = random.Random(0), 0
    for sample, undone in enumerate(itertools.islice(durable.losses(), 20)):
        state = tmp_path / str(sample)
        durable.write_out(state, undone, chance)
        reader, passed_over = open_newest(str(state))
        lost += reader is None or bool(passed_over)
    assert lost > 0


SAVING = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint_crash import save, savers

root, nonce, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
writers = savers(root, nonce, asynchronous=True, keep=2)
while True:
    step += 1
    save(writers, step, size=100_000)
    for writer in writers:
        writer.wait()
    print(step, flush=True)
"""


def test_after_kill_9_at_any_moment_no_published_checkpoint_is_lost(tmp_path: Path, full_drills: bool) -> None:
    chance, step = random.Random(), 0
    code = SAVING.format(tests=str(Path(__file__).parent))
    for attempt in range(200 if full_drills else 20):
        command = [sys.executable, "-c", code, str(tmp_path), f"attempt{attempt}", str(step)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            published = int(child.stdout.readline())
            time.sleep(chance.uniform(0, 0.05))
            child.send_signal(signal.SIGKILL)
            published = max([published, *map(int, child.stdout.read().split())])
        step = loaded_step(tmp_path, size=100_000)
        assert published <= step <= published + 1
    assert step >= 20
    assert len(os.listdir(tmp_path)) <= 4  # two kept, one too many, one unfinished


def test_a_full_disk_fails_the_save_and_is_freed_again(small_disk: Path) -> None:
    reports: list[SaveReport] = []
    writers = savers(small_disk, "a", asynchronous=True, keep=2, report=reports.append)
    save(writers, 1, size=100_000)  # 0.8 MB
    writers[0].wait()
    used = os.statvfs(small_disk).f_bfree
    save(writers, 2, size=200_000)
    with pytest.raises(CheckpointError, match="No space left on device"):
        writers[0].wait()
    for writer in writers:
        writer.close()
    assert any(not report.ok and "No space left" in (report.error or "") for report in reports)
    assert loaded_step(small_disk, size=100_000) == 1
    writers = savers(small_disk, "b", asynchronous=True, keep=2)
    save(writers, 3, size=1000)
    writers[0].wait()
    assert loaded_step(small_disk, size=1000) == 3
    assert abs(os.statvfs(small_disk).f_bfree - used) < 20  # pages of 4 KiB: all but the new one were freed


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint_crash import loaded_step, save, savers

root, reports = Path(sys.argv[1]), []
writers = savers(root, "a", report=reports.append, patience_seconds=0.0)
save(writers, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save(writers, 2, size=100_000)
assert [report.ok for report in reports] == [True, True, False, False], reports
assert "File too large" in reports[-2].error, reports
assert loaded_step(root) == 1
save(writers, 3)
assert loaded_step(root) == 3
print("survived")
"""


def test_a_limit_on_file_sizes_fails_the_save_alone(tmp_path: Path) -> None:
    code = LIMITED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "survived\n", done.stderr


def test_a_save_that_is_given_up_at_exit_harms_nothing(tmp_path: Path) -> None:
    """A process that ends while another writer's part is missing must end, and leave the previous checkpoint."""
    save(savers(tmp_path, "before"), 1)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_checkpoint_crash import savers
savers(Path({str(tmp_path)!r}), "after", asynchronous=True)[0].save(2, {{"model": []}}, {{}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert loaded_step(tmp_path) == 1
    with pytest.raises(CheckpointError):
        CheckpointReader(tmp_path / "s00000002-after")
