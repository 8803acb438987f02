"""Two hosts that mpirun reaches, for the conformance jobs of the launcher `mpi`."""

from __future__ import annotations

import os
from typing import Any

import pytest

from unitrain.errors import UserError
from unitrain.launchers._mpi_run import find_mpirun

from . import ssh_system


class System(ssh_system.System):
    """See `tests/contract/systems.py`."""

    environ = {"PYTHONPATH": str(ssh_system.ROOT)}

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
