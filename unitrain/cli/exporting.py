"""`unitrain export`: a run's weights as a folder that other libraries load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .runs import Name, counted


def export(
    name: Name,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new folder for the export.")],
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", min=0, help="Of which step; else the newest.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="TYPE", help="fp32, bf16 or fp16.")] = "fp32",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest file, such as 500MB or 1GB.")
    ] = "4GB",
    merge: Annotated[
        bool, typer.Option("--merge", help="Add adapters (LoRA) to the weights they stand beside.")
    ] = False,
) -> None:
    """Write a run's weights as a folder that `from_pretrained` loads."""
    from ..export import export as write
    from ..run import Run

    done = write(Run.open(name), to, step=step, dtype=dtype, max_shard_size=max_shard_size, merge=merge)
    print(
        f"step {done.step} as {done.what}: {counted(len(done.files), 'file')}, {done.num_bytes} bytes, in {done.folder}"
    )
