"""On which Ray: a running cluster, or a private one on this machine that ends with whoever asked for it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from ..errors import UserError
from ..world import environment, forget_variables

FOREIGN_STARTERS = ("SLURM_", "PMI_", "PMIX_", "OMPI_")  # an actor is no rank of theirs, and MPI would obey them
OBJECT_STORE_BYTES = 200 << 20  # of a private cluster; what does not fit is spilled to its folder
_JOIN_SECONDS = 10.0
_PREFIX = "uray-"  # of a private cluster's folder; its owner's process number follows
_NEIGHBOUR = "127.0.0.2"  # of the loopback device: for 127.0.0.1 Ray takes the machine's own address instead
_SHORT = 60  # letters of a temporary folder: sockets below it may have 107 in all


@dataclass(frozen=True)
class RayCluster:
    """The cluster that this process is connected to."""

    address: str  # host:port of its control store
    private: bool  # made by us, and ended by us


@contextlib.contextmanager
def private_or_running(
    address: str | None,
    *,
    cpus: int,
    gpus: int = 0,
    name: str,
    object_store_bytes: int = OBJECT_STORE_BYTES,
) -> Iterator[RayCluster]:
    """Connect to the cluster at `address` or RAY_ADDRESS; without either, make a private one of so many CPUs and GPUs.

    A Ray that this process is connected to already is used as it is, and left so. `name` is the namespace of what is
    started here. Raises UserError where there is no cluster at the address.
    """
    variables = environment()
    if ray.is_initialized():
        yield RayCluster(ray.get_runtime_context().gcs_address, private=False)
        return
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # what is of interest is raised by who waits for it
    address = address or variables.get("RAY_ADDRESS")
    if address:
        _join(address, name)
        folder = None
    else:
        if variables.get("RAY_AUTH_MODE") != "disabled":
            # Whoever finds the port may run code here: so nobody without the token, which only our processes inherit.
            # Ray itself asks for one by default, and would keep it in the home folder.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        _sweep(_short_folder())
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_short_folder()))
        _start(folder, cpus=cpus, gpus=gpus, name=name, object_store_bytes=object_store_bytes)
    try:
        yield RayCluster(ray.get_runtime_context().gcs_address, private=folder is not None)
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def forget_starters() -> None:
    """Remove from this process what Slurm and MPI tell their ranks; an actor calls it before it imports a framework."""
    forget_variables(*FOREIGN_STARTERS)


def visible_gpus() -> int:
    """GPUs of this machine that this process may use. Asks the kernel's driver, no framework."""
    shown = environment().get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([name for name in shown.split(",") if name.strip() and name.strip() != "-1"])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def _join(address: str, name: str) -> None:
    if address.startswith("ray://"):
        raise UserError(
            f"{address} is a Ray Client's address, through which no memory is shared; run on a machine of the cluster "
            "and give host:port of its control store, or `auto`"
        )
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for a minute
            socket.create_connection((host.strip("[]"), int(port)), _JOIN_SECONDS).close()
        ray.init(
            address=address, namespace=name, log_to_driver=False, logging_level=logging.WARNING, configure_logging=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"there is no Ray cluster at {address!r} ({(str(error) or type(error).__name__).splitlines()[0]});"
            " start one, or leave the address and RAY_ADDRESS out for a private one on this machine"
        ) from error


def _start(folder: Path, *, cpus: int, gpus: int, name: str, object_store_bytes: int) -> None:
    hidden = {key: value for key, value in environment().items() if key.startswith(FOREIGN_STARTERS)}
    forget_variables(*FOREIGN_STARTERS)  # Ray's processes, and the actors after them, inherit the rest
    notices = logging.getLogger("ray._private.authentication.authentication_token_setup")
    notices.setLevel(logging.ERROR)  # that a token is asked for
    _CHILDREN.apart = True
    try:
        ray.init(
            num_cpus=cpus,
            num_gpus=gpus,
            namespace=name,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=False,
            object_store_memory=object_store_bytes,
            _temp_dir=str(folder),
            _node_ip_address=_NEIGHBOUR,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        _CHILDREN.apart = False
        os.environ.update(hidden)


class _Children(threading.local):
    """Whether processes that this thread starts leave our session: a signal to our group is then none to Ray."""

    apart = False

    def leave(self) -> None:
        """Called in each child."""
        if self.apart:
            os.setsid()


_CHILDREN = _Children()
os.register_at_fork(after_in_child=_CHILDREN.leave)


def _sweep(parent: str) -> None:
    """Remove what is left of clusters whose owners were killed."""
    for folder in Path(parent).glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if owner.isdigit() and not Path(f"/proc/{owner}").exists() and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


def _short_folder() -> str:
    """Where temporary files go, unless sockets could have no name there."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _SHORT else "/tmp"
