"""How many CPU threads a rank gets where the user has not said it."""

from __future__ import annotations

import os


def thread_defaults(nproc: int) -> dict[str, str]:
    """Variables for ranks that share this machine; those of the user's environment come before them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        # numpy's threads would start at import, and a process that has some cannot be forked safely.
        "OPENBLAS_NUM_THREADS": "1",
    }
