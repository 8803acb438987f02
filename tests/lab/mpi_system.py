"""Two hosts that mpirun reaches, for the conformance jobs of the launcher `mpi`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from unitrain.errors import UserError
from unitrain.launchers._mpi_run import find_mpirun

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("unitrain_lab_ssh_system", HERE / "ssh_system.py")
assert _spec is not None and _spec.loader is not None
_ssh = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_ssh)


class System(_ssh.System):  # type: ignore[misc,name-defined]  # found by its path
    """See `tests/contract/systems.py`."""

    environ = {"PYTHONPATH": str(_ssh.ROOT)}

    def __enter__(self) -> System:
        try:
            find_mpirun("mpirun")
        except UserError as error:
            pytest.skip(f"not run: {error}")
        super().__enter__()
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Of the launcher."""
        return {
            "hosts": self.lab.names,
            "ssh_config": str(self.lab.ssh_config),
            "environment": ["PYTHONPATH"],
            "allow_run_as_root": os.geteuid() == 0,
        }
