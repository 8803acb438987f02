"""How ranks of JAX join, what they tell each other, and how they end when one of them is lost."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import api as jax_api
from jax._src import distributed as jax_distributed
from jax._src import xla_bridge as jax_bridge

from unitrain.errors import ExitCode, RankFailed, Refused
from unitrain.meeting import Meeting, free_port
from unitrain.world import World

# How long a rank that has lost another one still lives: whoever failed first, and its agent, are to speak before it.
LAST_SECONDS = 1.0
SHUTDOWN_SECONDS = 30  # that a rank which has ended well waits for the others
# what XLA says of collectives that another process has left
_BROKEN = ("Gloo", "onnection", "NCCL", "ocket", "coordination service", "UNAVAILABLE", "peer")


class Ranks:
    """One rank among all, and the devices of all."""

    def __init__(self, world: World, num_devices: int) -> None:
        self.world = world
        self.meeting = _enter(world)
        try:
            _prepare_backend(world, num_devices)
            _join(world, num_devices, self.meeting)
            self.devices = self._devices(num_devices)
        except BaseException:
            self.leave(failed=True)
            raise
        self.local_devices = [device for device in self.devices if device.process_index == jax.process_index()]

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self.world.rank

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (JSON), by rank."""
        return self.meeting.gather(value)

    @contextlib.contextmanager
    def noticing_losses(self) -> Iterator[None]:
        """Inside, a collective that fails because another rank has gone is told as that."""
        try:
            yield
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if self.world.size == 1 or not any(sign in str(error) for sign in _BROKEN):
                raise
            deadline = time.monotonic() + LAST_SECONDS
            while self.meeting.gone is None and time.monotonic() < deadline:
                time.sleep(0.01)  # the meeting is about to learn which rank it was
            lost = self.meeting.gone or f"the other ranks could not be reached: {error}"
            raise RankFailed(str(lost)) from error

    def leave(self, *, failed: bool) -> None:
        """Take leave of the others. A rank that fails leaves without a word, so that no other waits for it."""
        if failed:
            self.meeting.abandon()
            _MEETINGS.clear()
            _forget_others()
        elif self.meeting in _MEETINGS:
            _MEETINGS.remove(self.meeting)
            if not _MEETINGS:
                self.meeting.close()

    def _devices(self, num_devices: int) -> list[Any]:
        """`num_devices` of each rank, rank by rank. Raises Refused where a rank has fewer, or of another kind."""
        mine = jax.local_devices()
        told = self.gather([len(mine), mine[0].platform])
        for rank, (number, platform) in enumerate(told):
            if number < num_devices:
                raise Refused(
                    f"rank {rank} has {number} {platform} devices, and {num_devices} were asked for: start fewer ranks "
                    "on a machine, set strategy.options.local_devices, or let no JAX computation run before the Trainer"
                )
            if platform != told[0][1]:
                raise Refused(
                    f"rank {rank} computes on {platform} and rank 0 on {told[0][1]}; start one rank for each device, "
                    "or set JAX_PLATFORMS alike everywhere"
                )
        by_rank: dict[int, list[Any]] = {}
        for device in jax.devices():
            by_rank.setdefault(device.process_index, []).append(device)
        return [device for rank in sorted(by_rank) for device in by_rank[rank][:num_devices]]


# The meetings of strategies that are open in this process: one and the same, for all have the same coordinator.
_MEETINGS: list[Meeting] = []


def _enter(world: World) -> Meeting:
    meeting = _MEETINGS[0] if _MEETINGS else Meeting(world, lost=lambda error: end_with(str(error)))
    _MEETINGS.append(meeting)
    return meeting


def _prepare_backend(world: World, num_devices: int) -> None:
    """Say to JAX what cannot be changed once its backend runs; where it does so already, leave it."""
    if world.threads:
        os.environ.setdefault("NPROC", str(world.threads))  # XLA's own name for its threads
    first = world.local_rank * num_devices
    gpus = ",".join(str(number) for number in range(first, first + num_devices))
    with contextlib.suppress(RuntimeError):
        if num_devices > 1:
            jax.config.update("jax_num_cpu_devices", num_devices)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, and ranks not end by it
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            if jax.config.values.get(name) == "all":
                jax.config.update(name, gpus)


def _join(world: World, num_devices: int, meeting: Meeting) -> None:
    """Meet in JAX's own service, once a process: a backend lives as long as its process does."""
    if world.size == 1:
        return
    if not jax.distributed.is_initialized():
        host, _ = world.coordinator_address
        address = f"{host}:{meeting.share(free_port(host) if world.first else None)}"
        jax.distributed.initialize(
            address,
            world.size,
            world.rank,
            coordinator_bind_address=address,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
        _abort_slowly()
    if (jax.process_index(), jax.process_count()) != (world.rank, world.size):
        raise Refused(
            f"JAX runs as process {jax.process_index()} of {jax.process_count()}, and this is rank {world.rank} of "
            f"{world.size}; do not call jax.distributed.initialize, or give it the rank's numbers"
        )


def _abort_slowly() -> None:
    """Leave this process time to say which rank it has lost and to end by itself.

    Where rank 0 is gone, JAX's client calls abort(), and cannot be told to do otherwise. The handler of SIGABRT becomes
    libc's sleep(), which takes the signal's number for seconds: 6. Then abort() goes on.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _forget_others() -> None:
    """Keep JAX from waiting, when Python ends, for ranks that will not come, and from aborting because of them.

    What it would take down then is left to the kernel: nobody may take the last reference of it.
    """
    state = jax_distributed.global_state
    for held in (state.client, state.service, state.preemption_sync_manager, *jax_bridge.backends().values()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
    state.client = state.service = state.preemption_sync_manager = None
    atexit.unregister(jax_api.clean_up)


_ENDING = threading.Lock()


def end_with(message: str) -> NoReturn:
    """End this process from any thread: a rank that has lost another one can only wait for ever."""
    if not _ENDING.acquire(blocking=False):
        time.sleep(60)  # another thread is ending it
    print(message, file=sys.stderr, flush=True)
    time.sleep(LAST_SECONDS)
    sys.stdout.flush()
    os._exit(ExitCode.FAILED)
