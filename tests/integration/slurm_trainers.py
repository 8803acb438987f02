"""Trainers for jobs of Slurm: as slow as a file in the run's folder says, and telling where they run."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainers import Rows, Witness  # its folder is on the path of whoever loads this file

import unitrain


class Paced(Witness):
    """Sleeps in each step for as many seconds as the file `pace` says; not at all without it."""

    def step(self, batch: unitrain.Batch) -> unitrain.StepOut:
        """See Witness."""
        assert self.run is not None, "the run has started"
        try:
            self.seconds = float((self.run.folder / "pace").read_text())
        except (FileNotFoundError, ValueError):
            self.seconds = 0.0
        return super().step(batch)


class Where(Rows):
    """Says where it runs, and trains nothing."""

    def fit(self) -> Any:
        """The host, the cores and what Slurm has set."""
        names = ("CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK", "MASTER_ADDR", "SITE", "RANK", "LOCAL_RANK")
        found = {name: os.environ.get(name) for name in names}
        print(os.uname().nodename, found, Path.cwd(), flush=True)
        return SimpleNamespace(exit_code=0)
