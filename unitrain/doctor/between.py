"""What only several processes can find out together: the run's folder, names, ports, clocks, and how fast ranks sum.

Each function is called by all ranks, in the same order, and gives what this rank has to say.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import registry
from ..agent.records import hostname
from ..meeting import Meeting, free_port
from ..world import World
from .finding import Finding, compared, failed, passed, warned
from .machine import addresses_of, is_loopback

FOLDER = "doctor"
SEE_SECONDS = 30.0  # until a file must be seen by all; NFS keeps what it knows of a folder for so long
LATE_SECONDS = 2.0
KNOCK_SECONDS = 3.0
SKEW_SECONDS, LARGE_SKEW_SECONDS = 0.5, 30.0
ROUNDS = 7
SLOW_BYTES_A_SECOND = 50e6


def versions_agree(values: Sequence[tuple[str, Mapping[str, str]]]) -> list[Finding]:
    """Host and packages of each node; pure."""
    fix = "install the same on all nodes: one shared environment, or one image"
    differing = [
        finding
        for name in sorted({name for _, versions in values for name in versions} - {"system"})
        for finding in compared("versions", [(host, _named(name, versions)) for host, versions in values], fix)
        if finding.fix
    ]
    if differing:
        return differing
    known = values[0][1]
    return [passed("versions", ", ".join(f"{name} {known[name]}" for name in known if name != "system"))]


def _named(name: str, versions: Mapping[str, str]) -> str:
    return f"{name} {versions[name]}" if name in versions else f"no {name}"


def names_resolve(hosts: Sequence[str], own: str) -> list[Finding]:
    """Whether this node finds every other by its name."""
    lost = []
    for host in dict.fromkeys(hosts):
        if host != own and (not (found := addresses_of(host)) or all(map(is_loopback, found))):
            lost.append(f"{host} ({', '.join(found) or 'unknown'})")
    if lost:
        found_text = f"does not find {', '.join(lost)} by name"
        return [failed("names", found_text, "have DNS or /etc/hosts of every node know all others, by true addresses")]
    return [passed("names", "every node finds every other by its name")] if len(set(hosts)) > 1 else []


def folder_is_shared(meeting: Meeting, run_dir: Path, nodes: Mapping[int, str]) -> list[Finding]:
    """Write, fsync and rename a file; then see those of all others. `nodes`: the first rank of each, and its host."""
    rank = meeting.world.rank
    word, problem = secrets.token_hex(8), ""
    if rank in nodes:
        try:
            _write(run_dir / FOLDER / f"seen-by-{rank}", word)
        except OSError as error:
            problem = f"cannot be written and renamed in: {error.strerror}"
    words = meeting.gather(word)
    begun = time.monotonic()
    missing = dict(nodes)
    while missing and not problem and time.monotonic() - begun < SEE_SECONDS and rank in nodes:
        for other in list(missing):
            with contextlib.suppress(OSError):
                if (run_dir / FOLDER / f"seen-by-{other}").read_text() == words[other]:
                    del missing[other]
        if missing:
            time.sleep(0.02)
    seconds = time.monotonic() - begun
    meeting.barrier()
    if rank not in nodes:
        return []
    if problem:
        return [failed("folder", f"{run_dir} {problem}", "choose a folder that all nodes may write: --run-dir")]
    if missing:
        found = f"sees nothing of {', '.join(missing.values())} in {run_dir} within {SEE_SECONDS:.0f} s"
        return [failed("folder", found, "choose a folder on a disk that all nodes share: --run-dir")]
    if seconds > LATE_SECONDS:
        found = f"what others write in {run_dir} is seen after {seconds:.0f} s"
        return [warned("folder", found, "mount it with less caching (NFS: actimeo=1), or expect late logs and status")]
    return [passed("folder", "written, renamed and seen by all")]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def ports_reach(meeting: Meeting, nodes: Mapping[int, str]) -> list[Finding]:
    """Whether this node can connect to a port of every other: gloo and NCCL need a path between any two."""
    world = meeting.world
    with socket.create_server(("", 0), backlog=max(world.size, 16)) as server:
        places = meeting.gather([_own_address(world), server.getsockname()[1]])
        refused = []
        for other, host in nodes.items():
            if world.rank in nodes and other != world.rank:
                address, port = places[other]
                try:
                    socket.create_connection((address, port), timeout=KNOCK_SECONDS).close()
                except OSError as error:
                    refused.append(f"{host} at {address}:{port} ({error.strerror or error})")
        meeting.barrier()
    if refused:
        found = f"cannot connect to {', '.join(refused)}"
        return [failed("ports", found, "open all TCP ports above 1024 between the nodes: ranks choose free ones")]
    return [passed("ports", "every node reaches every other")] if world.rank in nodes and len(nodes) > 1 else []


def _own_address(world: World) -> str:
    """Of this machine, where it faces the first rank's."""
    host, port = world.coordinator_address
    with contextlib.suppress(OSError):
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing: it only chooses the way
            return str(probe.getsockname()[0])
    return host


def clocks_agree(meeting: Meeting, hosts: Sequence[str]) -> list[Finding]:
    """How far the clocks are from that of the first rank, which says so for all."""
    rounds = []
    for _ in range(ROUNDS):
        meeting.barrier()  # all come out of it within a few milliseconds
        rounds.append(meeting.gather(time.time()))
    if not meeting.world.first or len(set(hosts)) == 1:
        return []
    skews = {
        host: statistics.median(times[rank] - times[0] for times in rounds) for rank, host in enumerate(hosts) if rank
    }
    fix = "run chrony or another NTP client on every node"
    found = []
    for host, skew in skews.items():
        if abs(skew) > SKEW_SECONDS:
            verdict = failed if abs(skew) > LARGE_SKEW_SECONDS else warned
            found.append(verdict("clocks", f"that of {host} is {skew:+.1f} s from that of {hosts[0]}", fix))
    return found or [passed("clocks", f"within {max(map(abs, skews.values())) * 1000:.0f} ms")]


def ranks_sum(meeting: Meeting, framework: str = "torch") -> list[Finding]:
    """An all-reduce by the framework that is installed, and its bandwidth; the first rank says so for all."""
    world = meeting.world
    host, _ = world.coordinator_address
    port = meeting.share(_port(host) if world.first else None)
    try:
        mine = registry.resolve(registry.PROBES[framework])(world, f"{host}:{port}")
    except ModuleNotFoundError as error:
        mine = {"absent": str(error)}
    except Exception as error:  # whatever a library raises is a finding, and the other checks count all the same
        mine = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    everyone: list[dict[str, Any]] = meeting.gather(mine)
    if any("absent" in one for one in everyone):
        return []  # said already by the machine's own checks
    findings = [replace(one, node=hostname()) for one in _devices(mine)] if world.local_rank == 0 else []
    if not world.first:
        return findings
    broken = [f"rank {rank}: {one['error']}" for rank, one in enumerate(everyone) if "error" in one]
    if broken:
        fix = "see address, names and ports above; or set GLOO_SOCKET_IFNAME to the interface between the nodes"
        return [*findings, failed("all-reduce", "; ".join(broken[:2]), fix)]
    speed = min(one["bytes"] / one["seconds"] for one in everyone)
    found = f"{everyone[0]['bytes'] >> 20} MiB over {world.size} ranks by gloo: {speed / 1e9:.2f} GB/s"
    if speed < SLOW_BYTES_A_SECOND:
        fix = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the fastest interface between the nodes"
        return [*findings, warned("all-reduce", found, fix)]
    return [*findings, passed("all-reduce", found)]


def _devices(mine: Mapping[str, Any]) -> list[Finding]:
    """What torch sees of this node's devices."""
    if "error" in mine:
        return []
    if mine["gpus"]:
        return [passed("torch", f"{mine['version']}, {mine['gpus']} x {mine['gpu']}")]
    if mine["device_files"]:
        found = f"{mine['version']} sees none of {mine['device_files']} GPUs ({mine['why']})"
        return [
            failed("torch", found, "install a torch with CUDA that this driver serves; look at CUDA_VISIBLE_DEVICES")
        ]
    return [passed("torch", f"{mine['version']}, no GPU here")]


def _port(host: str) -> int:
    try:
        return free_port(host)
    except OSError:  # the name is another machine's for this one
        return free_port("")
