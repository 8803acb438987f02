"""How the ranks of a TensorFlow run find each other, sum tensors, and end when one of them dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import tensorflow as tf

from unitrain.errors import ExitCode, RankFailed, UserError
from unitrain.meeting import Meeting, PeerLost, free_port
from unitrain.world import World

NOTICE_SECONDS = 1.0  # in which the death of a rank is known to all others
BUCKET_BYTES = 32 << 20  # of one all-reduce: the first may then begin before the last gradient is there
# As integers of the same width, so that a broadcast by summing with zeros keeps every bit.
BITS = {1: tf.int8, 2: tf.int16, 4: tf.int32, 8: tf.int64}
SUMMABLE = {tf.int8: tf.int32, tf.int16: tf.int32}


class Ranks:
    """All ranks of a run. Collectives on tensors are the distribution strategy's, all else goes over the meeting."""

    def __init__(self, world: World, communication: str) -> None:
        self.world, self.rank, self.size = world, world.rank, world.size
        self.meeting = Meeting(world, lost=self._end)
        self._distribution = _join(world, self.meeting, communication) if world.size > 1 else None

    @property
    def first(self) -> bool:
        """True on the rank that speaks for all."""
        return self.rank == 0

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function as this rank's replica: `sum` works in it, and the user's own collectives do."""
        return function(*args) if self._distribution is None else self._distribution.run(function, args)

    def sum(self, tensors: Sequence[Any]) -> list[Any]:
        """Sums over all ranks of flat tensors of one dtype, in as few collectives as size allows; inside `run`."""
        if self._distribution is None:
            return list(tensors)
        replica = tf.distribute.get_replica_context()
        reduced: list[Any] = []
        for bucket in _buckets(tensors):
            flat = replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.concat(bucket, 0))
            reduced += tf.split(flat, [int(tensor.shape[0]) for tensor in bucket])
        return reduced

    def broadcast(self, variables: Sequence[Any]) -> None:
        """Give variables rank 0's values, bit for bit, in one collective for each width; inside `run`."""
        for width in sorted({variable.dtype.size for variable in variables}):
            members = [variable for variable in variables if variable.dtype.size == width]
            flat = tf.concat([tf.reshape(_bits(variable), [-1]) for variable in members], 0)
            flat = self.sum([flat if self.first else tf.zeros_like(flat)])[0]
            parts = tf.split(flat, [variable.shape.num_elements() for variable in members])
            for variable, part in zip(members, parts, strict=True):
                variable.assign(_from_bits(tf.reshape(part, variable.shape), variable.dtype))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Say which rank is missing where a collective fails."""
        try:
            yield
        except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
            if self._distribution is None:
                raise
            time.sleep(NOTICE_SECONDS)  # of a rank that has died the meeting tells, and ends this process
            found = re.findall(r"/task:(\d+)", error.message)
            lost = sorted({int(number) for number in found} - {self.rank})
            who = f"rank {lost[0]}" if len(lost) == 1 else "another rank"
            raise RankFailed(f"{who} no longer answers; see its log. TensorFlow says: {_reason(error)}") from error

    def close(self) -> None:
        """Leave the others."""
        self.meeting.close()

    def _end(self, error: PeerLost) -> NoReturn:
        """Called from the meeting's own thread: this rank's main thread may be waiting in a collective for ever."""
        sys.stdout.flush()
        print(error, file=sys.stderr, flush=True)
        os._exit(ExitCode.FAILED)


def _join(world: World, meeting: Meeting, communication: str) -> Any:
    """One a process: TensorFlow joins a cluster once."""
    global _distribution
    if _distribution is None:
        host = _own_host(world)
        workers = meeting.gather(f"{host}:{free_port(host)}")
        task = {"type": "worker", "index": world.rank}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
        implementation = tf.distribute.experimental.CommunicationImplementation[communication.upper()]
        options = tf.distribute.experimental.CommunicationOptions(implementation=implementation)
        try:
            _distribution = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
        except RuntimeError as error:
            if "program startup" not in str(error):
                raise
            raise UserError(
                "TensorFlow has worked before the ranks could meet, so that they cannot any more; make tensors and "
                "variables in build_model and loss, not where the trainer's file is imported"
            ) from error
    return _distribution


_distribution: Any = None


def _own_host(world: World) -> str:
    """This node's address as the other ranks see it."""
    host, port = world.coordinator_address
    if world.first:
        return host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((host, port))
        found: str = probe.getsockname()[0]
    return found


def _buckets(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    bucket: list[Any] = []
    size = 0
    for tensor in tensors:
        amount = tensor.shape.num_elements() * tensor.dtype.size
        if bucket and size + amount > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += amount
    if bucket:
        yield bucket


def _reason(error: tf.errors.OpError) -> str:
    """The line of TensorFlow's message that tells what happened; the others tell where in the graph."""
    lines: list[str] = [line.strip() for line in error.message.splitlines()]
    return next((line for line in lines if "aborted" in line or "unhealthy" in line), lines[0])


def _bits(variable: Any) -> Any:
    value = tf.cast(variable, tf.int8) if variable.dtype == tf.bool else variable
    bits = tf.bitcast(value, BITS[variable.dtype.size])
    return tf.cast(bits, SUMMABLE.get(bits.dtype, bits.dtype))


def _from_bits(bits: Any, dtype: Any) -> Any:
    bits = tf.cast(bits, BITS[dtype.size])
    return tf.cast(bits, tf.bool) if dtype == tf.bool else tf.bitcast(bits, dtype)
