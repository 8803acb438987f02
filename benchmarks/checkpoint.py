"""What does a checkpoint cost? The stall of the step, the write and the read, each against the bare operation.

    python benchmarks/checkpoint.py [--mib N] [--rounds N] [--folder DIR] [--json FILE] [--markdown FILE]

One rank with fp32 tensors of a transformer's shapes. Everything runs in turn within a round, on the same bytes and in
the same file system; ratios are paired within a round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import Machine, facts_in_words, ratio, table, write

from unitrain.checkpoint import Saver, SaveReport, open_newest
from unitrain.strategy import Shard

GOAL_STALL, GOAL_SAVE, GOAL_LOAD = 1.2, 0.8, 0.8
MIB = 1 << 20
READ_BYTES = 4 * MIB
COPY, STALL, DCP = "memcpy of the same bytes", "unitrain, asynchronous", "torch DCP async_save"
DD, SAVE, SAVE_ALL = "dd, write and fsync", "unitrain, until published", "unitrain, old one deleted too"
RAW, LOAD = "read of the same bytes", "unitrain, every byte verified"

Seconds = Mapping[str, Sequence[float]]


def main() -> int:
    """Measure, print; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="on the file system to measure; the system's own for scratch")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    known = parser.parse_args()

    machine = Machine()
    with (
        tempfile.TemporaryDirectory(dir=known.folder) as scratch,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        seconds = _measured(_tensors(known.mib * MIB), known.rounds, Path(scratch), Path(memory))
    facts = {**machine.facts(), "rounds": known.rounds, "mib": known.mib}
    missed = _missed(seconds)
    text = (
        f"{facts_in_words(facts)}- {known.mib} MiB of fp32 tensors, rounds: {known.rounds}\n\n"
        f"How long the step waits for an asynchronous save:\n\n{_table(seconds, (COPY, STALL, DCP), known.mib)}\n"
        f"How long until a save is durable:\n\n{_table(seconds, (DD, SAVE, SAVE_ALL), known.mib)}\n"
        f"How long until a checkpoint is loaded, none of it in the page cache:\n\n"
        f"{_table(seconds, (RAW, LOAD), known.mib)}\n{_verdict(seconds, missed)}"
    )
    print(text, end="")
    if known.json:
        write(known.json, {"facts": facts, "seconds": seconds, "missed": missed})
    if known.markdown:
        write(known.markdown, f"# What a checkpoint costs\n\n{text}")
    return 1 if missed else 0


def _tensors(total_bytes: int) -> dict[str, NDArray[np.float32]]:
    """Matrices of 4 MiB, and a vector for each."""
    draw = np.random.default_rng(0)
    found = {}
    for number in range(total_bytes // (4 * MIB)):
        found[f"layers.{number}.weight"] = draw.standard_normal((1024, 1024), dtype=np.float32)
        found[f"layers.{number}.bias"] = draw.standard_normal(1024, dtype=np.float32)
    return found


def _measured(tensors: dict[str, NDArray[np.float32]], rounds: int, folder: Path, memory: Path) -> Seconds:
    """Name -> seconds of each round. The first round of all, which takes memory for the first time, is left out."""
    found: dict[str, list[float]] = {name: [] for name in (COPY, STALL, DCP, DD, SAVE, SAVE_ALL, RAW, LOAD)}
    source, copied = memory / "bytes", folder / "bytes"
    with source.open("wb") as file:
        for data in tensors.values():
            file.write(data.data)
    room = {name: np.empty_like(data) for name, data in tensors.items()}
    parts: list[Callable[[], Mapping[str, float]]] = [
        lambda: {COPY: _timed(lambda: [np.copyto(room[name], data) for name, data in tensors.items()])},
        lambda: {DD: _dd(source, copied)},
        _saves(tensors, folder / "saved"),
        _dcp(tensors, folder / "dcp"),
        lambda: {RAW: _raw_read(copied)},
        lambda: {LOAD: _load(tensors, folder / "saved")},
    ]
    for number in range(rounds + 1):
        # The reads come after the writes of the same round.
        order = parts if number % 2 else [*reversed(parts[:4]), *reversed(parts[4:])]
        for part in order:
            os.sync()
            for name, value in part().items():
                if number:
                    found[name].append(value)
        print(f"round {number} of {rounds}", file=sys.stderr)
    return found


def _saves(tensors: Mapping[str, NDArray[np.float32]], folder: Path) -> Callable[[], Mapping[str, float]]:
    """One asynchronous save: its stall, until it is published, and until the one before is deleted."""
    reports: list[SaveReport] = []
    saver = Saver(
        str(folder), writer=0, writers=1, nonce="bench", keep=1, asynchronous=True, producer={}, report=reports.append
    )
    shards = {
        "model": [Shard(name, "param", "float32", data.shape, (0,) * data.ndim, data) for name, data in tensors.items()]
    }

    def save() -> Mapping[str, float]:
        began = time.perf_counter()
        saver.save(len(reports) + 1, shards, {})
        stalled = time.perf_counter() - began
        saver.wait()
        return {STALL: stalled, SAVE: reports[-1].seconds, SAVE_ALL: time.perf_counter() - began}

    return save


def _dcp(tensors: Mapping[str, NDArray[np.float32]], folder: Path) -> Callable[[], Mapping[str, float]]:
    """torch's own: the same tensors, staged in host memory that is used again."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    state = {name: torch.from_numpy(data) for name, data in tensors.items()}
    writer_options: dict[str, Any] = {"sync_files": True}

    def save() -> Mapping[str, float]:
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        future = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(folder, **writer_options))
        stalled = time.perf_counter() - began
        getattr(future, "upload_completion", future).result()
        return {DCP: stalled}

    return save


def _dd(source: Path, to: Path) -> float:
    to.unlink(missing_ok=True)
    command = ["dd", f"if={source}", f"of={to}", "bs=64M", "conv=fsync", "status=none"]
    return _timed(lambda: subprocess.run(command, check=True))


def _raw_read(path: Path) -> float:
    _forget(path)

    def read() -> None:
        place = memoryview(np.empty(path.stat().st_size, dtype=np.uint8))  # a load takes fresh memory as well
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(place[:READ_BYTES]):
                place = place[count:]

    return _timed(read)


def _load(tensors: Mapping[str, NDArray[np.float32]], folder: Path) -> float:
    for path in folder.rglob("*"):
        if path.is_file():
            _forget(path)
    loaded: list[NDArray[Any]] = []

    def load() -> None:
        reader = open_newest(str(folder), verify="full").reader
        assert reader is not None, "it was saved above"
        role = reader.role("model")
        loaded.extend(
            role.read(kind, name, (0,) * len(info.shape), info.shape) for (kind, name), info in role.tensors.items()
        )

    seconds = _timed(load)
    assert all((a == b).all() for a, b in zip(loaded, tensors.values(), strict=True)), "what was saved was not loaded"
    return seconds


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(act: Callable[[], Any]) -> float:
    assert threading.active_count() < 50, "nothing is left over from a round"
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _table(seconds: Seconds, names: Sequence[str], mib: int) -> str:
    base = names[0]
    rows = []
    for name in names:
        middle, low, high = ratio(seconds[name], seconds[base])
        rate = mib / statistics.median(seconds[name])
        rows.append([
            name,
            f"{1000 * statistics.median(seconds[name]):.0f}",
            f"{rate:.0f}",
            *(["-", "-"] if name == base else [f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{1 / middle:.2f}"]),
        ])  # fmt: skip
    return table(["what", "median ms", "MiB/s", "x the time (95 %)", "x the rate"], rows)


def _missed(seconds: Seconds) -> list[str]:
    stall, save, load = _ratios(seconds)
    missed = [f"the stall is {stall:.2f} x memcpy"] if stall > GOAL_STALL else []
    missed += [f"a save runs at {save:.2f} x dd"] if save < GOAL_SAVE else []
    return missed + ([f"a load runs at {load:.2f} x a raw read"] if load < GOAL_LOAD else [])


def _ratios(seconds: Seconds) -> tuple[float, float, float]:
    """Stall as a share of the time of memcpy; save and load as shares of the rate of dd and of a raw read."""
    stall = ratio(seconds[STALL], seconds[COPY])[0]
    return stall, 1 / ratio(seconds[SAVE], seconds[DD])[0], 1 / ratio(seconds[LOAD], seconds[RAW])[0]


def _verdict(seconds: Seconds, missed: Sequence[str]) -> str:
    stall, save, load = _ratios(seconds)
    dcp = ratio(seconds[DCP], seconds[COPY])[0]
    lines = [
        f"- stall {stall:.2f} x memcpy, goal at most {GOAL_STALL}; torch DCP {dcp:.2f} x",
        f"- save {save:.2f} x the rate of dd, goal at least {GOAL_SAVE}",
        f"- load {load:.2f} x the rate of a raw read, goal at least {GOAL_LOAD}",
        *(f"- MISSED: {problem}" for problem in missed),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
