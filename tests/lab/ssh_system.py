"""Two hosts that ssh reaches, for the conformance jobs of the launcher `ssh`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from .hosts import CannotRun, hosts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class System:
    """See `tests/contract/systems.py`."""

    nodes, nproc = 2, 1
    environ: Mapping[str, str] = {}
    patience_seconds = 60.0
    detaches, process = True, True

    def __enter__(self) -> System:
        self._stack = contextlib.ExitStack()
        try:
            variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            self.lab = self._stack.enter_context(hosts(self.nodes, environ=variables))
        except CannotRun as error:
            pytest.skip(f"not run: {error}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def options(self) -> dict[str, Any]:
        """Of the launcher."""
        return {"hosts": self.lab.names, "ssh_config": str(self.lab.ssh_config), "silence_seconds": 10}

    def folder(self, here: Path) -> Path:
        """The hosts see this machine's files."""
        return Path(tempfile.mkdtemp(dir=here))

    def left(self, run_dir: Path) -> list[str]:
        """Processes of the run on the hosts, and here."""
        found = [f"{name}: {words}" for name in self.lab.names for words in self.lab.processes(name).values()]
        return [words for words in found if str(run_dir) in words or "unitrain" in words]
