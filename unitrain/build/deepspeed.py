"""DeepSpeed's compiled operators, ahead of the first run that needs them.

    python -m unitrain.build deepspeed

DeepSpeed compiles on first use, in silence, and a build that was killed leaves a lock on which all later ones wait for
ever. torch's own folder for extensions holds one build for all environments, each of which would compile anew what
another one has left there; so a virtual environment keeps its own, unless TORCH_EXTENSIONS_DIR names a folder.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

Say = Callable[[str], None]
RELEASE_SECONDS = 1.0  # a build that ends closes its lock just before it removes it


class Operator(NamedTuple):
    """One operator of DeepSpeed."""

    builder: str  # its class in deepspeed.ops.op_builder
    folders: tuple[str, ...]  # where torch compiles it and what it loads first
    needs: str  # what it cannot be compiled without, and how to get it
    usual: str  # how long compiling takes


OPERATORS = {
    "cpu_adam": Operator("CPUAdamBuilder", ("cpu_adam",), "a C++ compiler and ninja", "half a minute"),
    "async_io": Operator(
        "AsyncIOBuilder",
        ("pin_memory", "async_io"),
        "libaio's headers (Debian: libaio-dev), a C++ compiler and ninja",
        "some minutes",
    ),
}


def ensure(names: Iterable[str], say: Say) -> None:
    """Compile operators that were not compiled before, and load them. Raises UserError where they cannot be."""
    for name in names:
        operator = OPERATORS[name]
        folder = _folder(name)
        with _one_at_a_time(folder.parent):
            for part in operator.folders:
                _remove_stale_lock(folder.parent / part, say)
            was_built = is_built(name)
            if not was_built:
                say(f"building DeepSpeed's {name} (once, about {operator.usual}) in {folder}")
            began = time.monotonic()
            try:
                _builder(name).load(verbose=False)
            except Exception as error:  # of the compiler, of ninja, of the loader
                reason = str(error).strip().partition("\n")[0]
                raise UserError(
                    f"DeepSpeed's {name} could not be built: {reason}; it needs {operator.needs}: install them, then "
                    "run `python -m unitrain.build deepspeed`"
                ) from error
            if not was_built:
                say(f"built DeepSpeed's {name} in {time.monotonic() - began:.0f} s")


def is_built(name: str) -> bool:
    """True where the operator was compiled before."""
    return (_folder(name) / f"{name}.so").is_file()


def can_build(name: str) -> bool:
    """True where what the operator needs seems to be there."""
    return bool(_builder(name).is_compatible(verbose=False))


def main(arguments: list[str]) -> int:
    """Build all operators that the strategies use and that can be built here."""
    parser = argparse.ArgumentParser(
        prog="python -m unitrain.build deepspeed", description=(__doc__ or "").split("\n")[0]
    )
    parser.parse_args(arguments)
    for name, operator in OPERATORS.items():
        if is_built(name) or can_build(name):
            ensure([name], say=_print)
            _print(f"{name}: ready")
        else:
            _print(f"{name}: left out, it needs {operator.needs}")
    return 0


def _print(line: str) -> None:
    print(line, flush=True)


def settle_accelerator() -> None:
    """Say what DeepSpeed runs on before it is imported: it would look, and tell aloud that it found none."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.device_count() else "cpu")


def _builder(name: str) -> Any:
    settle_accelerator()
    try:
        import cpuinfo
        from deepspeed.ops import op_builder
    except ImportError as error:
        raise UserError("DeepSpeed is not installed: pip install 'unitrain[deepspeed]'") from error
    # DeepSpeed asks again and again what processor this is, each time in a process of its own for a second.
    if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
        cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    return getattr(op_builder, OPERATORS[name].builder)()


def settle_extensions() -> None:
    """Have torch keep the extensions of a virtual environment in it, apart for each version that they are made for."""
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        versions = "-".join(f"{name}-{importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "share", "unitrain", versions)))


def _folder(name: str) -> Path:
    from torch.utils import cpp_extension

    settle_extensions()
    # The private function knows every variable and version that the folder's name depends on.
    return Path(cpp_extension._get_build_directory(name, verbose=False))


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other builds of ours; the kernel lets go of this lock with the process that holds it."""
    with open(folder / "unitrain.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_stale_lock(folder: Path, say: Say) -> None:
    """Remove torch's lock file where no process of this machine holds it open: its build died."""
    lock = folder / "lock"
    if not _is_left(lock):
        return
    time.sleep(RELEASE_SECONDS)
    if _is_left(lock):
        say(f"removing {lock}, which a build that died left behind")
        lock.unlink(missing_ok=True)


def _is_left(path: Path) -> bool:
    """True where the file is there and no process has it open, as far as this one may look."""
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return False
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = os.stat(link)
        except OSError:  # the process or its file is gone, or not ours to look at
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return False
    return True
