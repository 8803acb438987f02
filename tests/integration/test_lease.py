"""Two jobs on one run: the second is refused before it does anything, and goes on once the first is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from unitrain.run import Run

from .runs import ROWS, run

SLOW = "train.steps=1000000"


def test_a_second_job_on_a_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(ROWS)
    folder = tmp_path / "run"
    start = [sys.executable, "-m", "unitrain.worker"]
    single = "strategy.name=single"
    first = subprocess.Popen(
        [*start, str(tmp_path / "rows.yaml"), "--run-dir", str(folder), single, SLOW],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not any(event["event"] == "checkpoint" for event in (Run(folder).events() if folder.is_dir() else [])):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        second = run([*start, str(folder), single, SLOW], cwd=tmp_path)
        assert second.code == 70
        assert f"checkpoints is in use by run run (pid {first.pid} on {os.uname().nodename}, since" in second.last_line
        assert "Traceback" not in second.err
        assert first.poll() is None, "the first goes on"
        saved = max(event["step"] for event in Run(folder).events() if event["event"] == "checkpoint")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    third = run([*start, str(folder), single, f"train.steps={saved + 5}"], cwd=tmp_path).succeeded()
    assert "resumed at step" in third.out
    assert not (folder / "checkpoints" / "LEASE").exists()
