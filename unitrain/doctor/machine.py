"""What one machine is: facts first, then what they mean for a run. Judging is a function of the facts alone."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..agent.records import hostname
from ..world import environment
from .finding import Finding, failed, passed, warned

GIB, MIB = 1 << 30, 1 << 20
FEWEST_FILES, FEW_FILES = 1024, 4096  # a rank of many peers and data workers holds thousands
LEAST_SHARED, LITTLE_SHARED = 128 * MIB, GIB  # containers come with 64 MiB, and data workers and NCCL want more
LEAST_DISK, LITTLE_DISK = GIB, 20 * GIB
UNLIMITED = resource.RLIM_INFINITY

# Variables of communication libraries that only say where to look or what to tell.
_HARMLESS = {
    *("NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS", "NCCL_VERSION", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"),
    *("GLOO_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
    *("TORCH_NCCL_DUMP_ON_TIMEOUT", "NCCL_IB_GID_INDEX", "NCCL_IB_TC", "NCCL_TOPO_FILE", "NCCL_NET_PLUGIN"),
}
_TUNING = ("NCCL_", "GLOO_", "TORCH_NCCL_", "RCCL_", "UCX_")
# What a starter sets, and a shell may have kept; agents set them anew for their ranks.
_STARTERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts of this machine, as a rank on it meets them. None: it does not say."""

    host: str
    addresses: tuple[str, ...]  # to which its own name leads
    interfaces: tuple[str, ...]
    open_files: int  # that a process may have
    most_open_files: int  # to which it may raise that
    locked_bytes: int
    infiniband: bool
    shared_bytes: int | None  # of /dev/shm, free
    disk_bytes: int | None  # of the run's disk, free
    disk: str
    variables: Mapping[str, str]  # of communication libraries
    cores: int
    torch: bool  # it is installed


def look(run_dir: Path) -> Machine:
    """The facts of this machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    host = hostname()
    return Machine(
        host=host,
        addresses=addresses_of(host),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        open_files=soft,
        most_open_files=hard,
        locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        shared_bytes=_free(Path("/dev/shm")),
        disk_bytes=_free(run_dir),
        disk=str(run_dir),
        variables={name: value for name, value in environment().items() if name.startswith(_TUNING)},
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch=importlib.util.find_spec("torch") is not None,
    )


def addresses_of(host: str) -> tuple[str, ...]:
    """To which a name leads on this machine; nothing where it leads nowhere."""
    try:
        found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except OSError:
        return ()
    return tuple(sorted({str(address[4][0]) for address in found}))


def is_loopback(address: str) -> bool:
    """True for an address that means `here` on every machine."""
    return address.startswith("127.") or address == "::1"


def leftovers(variables: Mapping[str, str]) -> list[Finding]:
    """What the shell of whoever asks still holds of another run."""
    names = [name for name in _STARTERS if name in variables]
    if not names:
        return [passed("shell", "no variables of a starter are left")]
    return [warned("shell", f"{', '.join(names)} left from another run", f"unset {' '.join(names)}")]


def judge(machine: Machine, nodes: int) -> list[Finding]:
    """What the facts mean for a run of so many nodes."""
    checks = (_name, _open_files, _locked_memory, _shared_memory, _disk, _variables, _cores, _torch)
    return [finding for check in checks for finding in check(machine, nodes)]


def _name(machine: Machine, nodes: int) -> Iterator[Finding]:
    host, addresses = machine.host, machine.addresses
    mend = f"give {host} its own address in /etc/hosts or DNS"
    if not addresses:
        verdict = warned if nodes == 1 else failed
        yield verdict("address", f"the name {host} leads nowhere", mend)
    elif all(map(is_loopback, addresses)):
        # Debian's installer writes it: others are then told to find this machine at themselves.
        found = f"the name {host} leads to {', '.join(addresses)}, which is this machine for nobody else"
        if nodes == 1:
            yield warned("address", found, f"harmless on one machine; for several, {mend}")
        elif "GLOO_SOCKET_IFNAME" in machine.variables:  # our agents set it where several nodes meet
            yield warned("address", f"{found}; gloo is told its interface, other libraries ask for the name", mend)
        else:
            yield failed("address", found, f"take that line out of /etc/hosts on {host}, and {mend}")
    else:
        found = f"the name leads to {', '.join(addresses)}" if nodes == 1 else "names lead to addresses of their own"
        yield passed("address", found)


def _open_files(machine: Machine, nodes: int) -> Iterator[Finding]:
    most = "" if machine.most_open_files == UNLIMITED else f" (at most {machine.most_open_files})"
    fix = f"ulimit -n {_most_files(machine)}, or LimitNOFILE= of the service that starts jobs"
    if machine.open_files == UNLIMITED:
        yield passed("open files", "unlimited")
    elif machine.open_files < FEWEST_FILES:
        yield failed("open files", f"{machine.open_files}{most}", fix)
    elif machine.open_files < FEW_FILES:
        yield warned("open files", f"{machine.open_files}{most}", fix)
    else:
        yield passed("open files", str(machine.open_files))


def _most_files(machine: Machine) -> int:
    return 65536 if machine.most_open_files == UNLIMITED else min(65536, max(machine.most_open_files, FEW_FILES))


def _locked_memory(machine: Machine, nodes: int) -> Iterator[Finding]:
    if machine.locked_bytes == UNLIMITED:
        yield passed("locked memory", "unlimited")
    elif not machine.infiniband:
        yield passed("locked memory", f"{machine.locked_bytes // MIB} MiB, and no InfiniBand that wants more")
    else:
        found = f"{machine.locked_bytes // MIB} MiB, and InfiniBand registers what it sends"
        yield failed("locked memory", found, "ulimit -l unlimited, or LimitMEMLOCK=infinity of the service")


def _shared_memory(machine: Machine, nodes: int) -> Iterator[Finding]:
    free = machine.shared_bytes
    fix = "docker run --shm-size=8g, or in Kubernetes an emptyDir of medium Memory at /dev/shm"
    if free is None:
        yield failed("shared memory", "there is no /dev/shm", fix)
    elif free < LEAST_SHARED:
        yield failed("shared memory", f"{free // MIB} MiB free in /dev/shm", fix)
    elif free < LITTLE_SHARED:
        yield warned("shared memory", f"{free // MIB} MiB free in /dev/shm", fix)
    else:
        yield passed("shared memory", f"{free / GIB:.0f} GiB free in /dev/shm")


def _disk(machine: Machine, nodes: int) -> Iterator[Finding]:
    free, fix = machine.disk_bytes, "free some, or set checkpoint.path or --run-dir to another disk"
    if free is None:
        yield failed("disk", f"{machine.disk} cannot be asked for its size", fix)
    elif free < LEAST_DISK:
        yield failed("disk", f"{free // MIB} MiB free at {machine.disk}", fix)
    elif free < LITTLE_DISK:
        yield warned("disk", f"{free / GIB:.1f} GiB free at {machine.disk}", fix)
    else:
        yield passed("disk", f"{_rough(free)} free")


def _rough(size: int) -> str:
    """Nodes that see the same disk a moment apart say the same."""
    return f"more than {max(step for step in (20, 50, 100, 500, 1000, 5000) if step * GIB <= size)} GiB"


def _variables(machine: Machine, nodes: int) -> Iterator[Finding]:
    tuned = sorted(name for name in machine.variables if name not in _HARMLESS)
    wrong = [
        name
        for name in _INTERFACES
        if machine.variables.get(name) and not _has_interface(machine.variables[name], machine.interfaces)
    ]
    for name in wrong:
        found = f"{name}={machine.variables[name]}, and there are only {', '.join(machine.interfaces)}"
        yield failed("variables", found, f"unset {name}, or name an interface of every node")
    if tuned:
        shown = ", ".join(f"{name}={machine.variables[name]}" for name in tuned)
        yield warned("variables", f"{shown} tune the communication", f"unset {' '.join(tuned)} unless you mean them")
    elif not wrong:
        yield passed("variables", "none tunes NCCL or gloo")


def _has_interface(wanted: str, there: tuple[str, ...]) -> bool:
    """As NCCL reads it: prefixes, `=` before exact names, `^` before those that are not meant."""
    if wanted.startswith("^"):
        return True
    exact, names = wanted.startswith("="), wanted.removeprefix("=").split(",")
    return any(name == word or (not exact and name.startswith(word)) for word in names for name in there)


def _cores(machine: Machine, nodes: int) -> Iterator[Finding]:
    if machine.cores == 1:
        yield warned("cores", "1", "ask for more: ranks, data workers and checkpoints share it (cpus_per_task, cpu)")
    else:
        yield passed("cores", str(machine.cores))


def _torch(machine: Machine, nodes: int) -> Iterator[Finding]:
    if not machine.torch:
        yield warned("torch", "it is not installed", "pip install torch, unless you train with another framework")


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
