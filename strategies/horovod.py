"""Horovod: every rank holds the whole model; ring all-reduces sum gradients while backward runs.

Sergeev and Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow" (2018).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from unitrain.batch import MicroBatch
from unitrain.errors import RankFailed, Refused, UserError
from unitrain.strategies import _torch_refusals
from unitrain.strategies._torch import JOIN_TIMEOUT, TorchStrategy
from unitrain.strategies._torch_engine import LossModule, Sharing, TorchEngine, TorchStepOut, norm_of
from unitrain.strategies._torch_horovod import meeting
from unitrain.strategies._torch_models import apply_model_options, build_model
from unitrain.strategies._torch_ranks import Ranks
from unitrain.strategy import HyperParameters, Role
from unitrain.world import World

CYCLE_MS = 1.0  # Horovod's own
FUSION_MB = 32
SILENCE_SECONDS = 60  # after which Gloo takes a rank that does not answer for lost
# as what a gradient travels where not as itself: Horovod cannot sum bfloat16
WIRE = {torch.bfloat16: torch.float32}


class Horovod(TorchStrategy):
    """Horovod over Gloo or MPI, started by our agent, torchrun, mpirun or horovodrun.

    Options: compression (none; fp16: gradients travel in half precision), adasum (combine gradients by Maleki et al.,
    "Scaling distributed training with adaptive summation", 2021, instead of summing them; MPI only),
    fusion_threshold_mb (gradients summed in one operation, 32), cycle_time_ms (how often Horovod looks for work, 1),
    backend (gloo, mpi), activation_checkpointing, compile.
    """

    name: ClassVar[str] = "horovod"
    problems = staticmethod(_torch_refusals.horovod)
    # How Horovod was begun by us. It ends with its process: begun a second time it would crash (0.28.1, where
    # HOROVOD_CYCLE_TIME is set), and after a failure the others would fail before this rank has told why.
    began: ClassVar[tuple[str, float] | None] = None

    def join(self, world: World) -> Ranks:
        """Meet the other ranks, unless this program has called hvd.init() or trained with Horovod before."""
        if self.device.type == "cuda" and world.size > 1 and not hvd.nccl_built():
            raise Refused(
                "this Horovod was built without NCCL, so it cannot sum what lies on GPUs; hide them "
                "(CUDA_VISIBLE_DEVICES=) to train on CPU, or use --strategy ddp"
            )
        self.num_bound = 0
        way = (self.options.get("backend", "gloo"), self.options.get("cycle_time_ms", CYCLE_MS))
        if not hvd.is_initialized():
            self._initialise(world)
            Horovod.began = way
        elif Horovod.began not in (None, way):
            raise Refused(
                f"Horovod began in this process with (backend, cycle_time_ms) = {Horovod.began} and lasts as long as "
                f"it; use a fresh process for {way}"
            )
        if (hvd.rank(), hvd.size()) != (world.rank, world.size):
            raise UserError(
                f"Horovod says rank {hvd.rank()} of {hvd.size()} where {world.starter} started rank {world.rank} of "
                f"{world.size}; start all ranks by one of horovodrun, mpirun, torchrun or unitrain launch"
            )
        return HorovodRanks(world.rank, world.size)

    def _initialise(self, world: World) -> None:
        # Horovod would fuse what happens to be ready; from three ranks on a sum's last bits depend on that. We fuse
        # by a plan instead.
        variables = {
            "HOROVOD_FUSION_THRESHOLD": "0",
            "HOROVOD_CYCLE_TIME": str(self.options.get("cycle_time_ms", CYCLE_MS)),
        }
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(SILENCE_SECONDS))
        if world.starter == "horovodrun" or world.size == 1:
            _init(variables)
            return
        transport = self.options.get("backend", "gloo")
        variables |= {"HOROVOD_CONTROLLER": transport, "HOROVOD_CPU_OPERATIONS": transport}
        if transport == "mpi":
            _init(variables)
            return
        with meeting(world, JOIN_TIMEOUT) as place:
            _init(variables | place)
            HorovodRanks(world.rank, world.size).barrier()

    def bind(self, role: Role, seed: int) -> TorchEngine:
        """See Strategy."""
        model = build_model(role, seed, self.device)
        apply_model_options(model, self.options)
        losses = LossModule(model, role.losses, self.device, precision=self.recipe.train.precision)
        if role.optimizer is None or self.world.size == 1:
            return TorchEngine(model, role, Sharing(losses), self.recipe, self.ranks)
        self.num_bound += 1
        sharing = Summed(losses, self.options, f"model-{self.num_bound}")
        return HorovodEngine(model, role, sharing, self.recipe, self.ranks)


def _init(variables: dict[str, str]) -> None:
    """Begin Horovod, which reads these variables and no others of that name; they tell other libraries nothing."""
    os.environ.update(variables)
    hvd.init()
    for name in variables:
        del os.environ[name]


class HorovodRanks(Ranks):
    """Collectives of Horovod."""

    def sum(self, tensor: Tensor) -> None:
        """See Ranks."""
        if self.size > 1 and tensor.numel():
            # Named by its shape: Horovod remembers what it has agreed on by name.
            name = f"unitrain.sum.{tensor.dtype}.{tuple(tensor.shape)}"
            wait_for(hvd.allreduce_async_(tensor, name=name, op=hvd.Sum))

    def broadcast(self, tensor: Tensor) -> None:
        """See Ranks. As bytes: Horovod knows neither bool nor bfloat16."""
        if self.size > 1 and tensor.numel():
            whole = tensor.detach().contiguous()
            data = whole.view(-1).view(torch.uint8)
            wait_for(hvd.broadcast_async_(data, 0, name=f"unitrain.broadcast.{len(data)}"))
            if whole.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(whole)


class HorovodEngine(TorchEngine):
    """Waits for the sums before anybody looks at a gradient."""

    sharing: Summed

    def _apply(self, hp: HyperParameters) -> TorchStepOut:
        self.sharing.collect()
        return super()._apply(hp)


class Bucket:
    """Gradients that travel together: one flat tensor, of which each parameter's gradient is a view."""

    def __init__(self, name: str, params: Sequence[Tensor], numbers: list[int], compressed: bool) -> None:
        self.name, self.numbers = name, numbers
        self.flat = torch.zeros(sum(param.numel() for param in params), dtype=params[0].dtype, device=params[0].device)
        self.grads: list[Tensor] = []
        begin = 0
        for param in params:
            # The strides that autograd would give it, which the fused optimizers rely on.
            strides = torch.empty_like(param, device="meta").stride()
            self.grads.append(self.flat.as_strided(param.shape, strides, begin))
            begin += param.numel()
        dtype = torch.float16 if compressed else WIRE.get(self.flat.dtype, self.flat.dtype)
        self.wire = self.flat if dtype == self.flat.dtype else torch.empty_like(self.flat, dtype=dtype)
        self.awaited: set[int] = set()  # parameters whose gradient of the last micro-batch is not there yet
        self.handle: int | None = None  # of the operation under way

    def submit(self, scale: float, op: Any) -> None:
        """Hand it to Horovod, scaled."""
        if scale != 1.0:
            self.flat.mul_(scale)
        if self.wire is not self.flat:
            self.wire.copy_(self.flat)
        self.handle = hvd.allreduce_async_(self.wire, name=self.name, op=op)

    def collect(self, scale: float) -> None:
        """Wait for the result, and scale it."""
        assert self.handle is not None, "submitted before"
        wait_for(self.handle)
        self.handle = None
        if self.wire is not self.flat:
            self.flat.copy_(self.wire)
        if scale != 1.0:
            self.flat.mul_(scale)


class Summed(Sharing):
    """Replicas whose gradients Horovod sums, a bucket at a time, while backward computes the next."""

    def __init__(self, losses: LossModule, options: Mapping[str, Any], name: str) -> None:
        super().__init__(losses)
        self.module = self._forward
        self.name = name
        self.op = hvd.Adasum if options.get("adasum") else hvd.Sum
        self.compressed = options.get("compression") == "fp16"
        self.params = [param for param in losses.model.parameters() if param.requires_grad]
        # Adasum weighs directions of single tensors.
        limit = 0 if self.op == hvd.Adasum else options.get("fusion_threshold_mb", FUSION_MB) * 2**20
        self.buckets = [
            Bucket(f"{name}.bucket-{number}", [self.params[n] for n in numbers], numbers, self.compressed)
            for number, numbers in enumerate(plan(self.params, limit))
        ]
        self.used: set[int] = set()
        self.last = False  # True in the backward pass whose gradients travel
        for bucket in self.buckets:
            for number in bucket.numbers:
                param: Any = self.params[number]  # its method for hooks has no types
                param.register_post_accumulate_grad_hook(functools.partial(self._arrived, bucket, number))

    def before_update(self, loss: str, first: MicroBatch) -> None:
        """See Sharing."""
        self.used.clear()
        torch._foreach_zero_([bucket.flat for bucket in self.buckets])
        for bucket in self.buckets:
            for number, grad in zip(bucket.numbers, bucket.grads, strict=True):
                self.params[number].grad = grad

    def before_micro(self, last: bool) -> None:
        """See Sharing."""
        self.last = last
        if last:
            for bucket in self.buckets:
                bucket.awaited = set(bucket.numbers)

    def _forward(self, loss: str, micro: MicroBatch) -> Tensor:
        """After the last forward pass the sums are known, and travel while backward runs."""
        total: Tensor = self.losses(loss, micro)
        if self.last:
            assert self.losses.totals is not None, "just computed"
            self.own_weight = self.losses.totals[1]
            self.totals = self.losses.totals.clone()
            self.totals_handle: int | None = hvd.allreduce_async_(self.totals, name=f"{self.name}.totals", op=hvd.Sum)
        return total

    def _arrived(self, bucket: Bucket, number: int, param: Tensor) -> None:
        """A gradient was added to its bucket; once all of the last micro-batch are there, the bucket leaves."""
        self.used.add(number)
        if not self.last:
            return
        if number not in bucket.awaited:
            raise UserError(
                "a parameter's gradient came twice in one backward pass, as reentrant activation checkpointing does; "
                "use torch.utils.checkpoint with use_reentrant=False, or strategy.options.activation_checkpointing"
            )
        bucket.awaited.remove(number)
        if not bucket.awaited:
            bucket.submit(self._scales()[0], self.op)

    def collect(self) -> None:
        """Wait until every gradient is the sum over all ranks."""
        self.last = False
        for bucket in self.buckets:
            if bucket.handle is None:  # the last micro-batch did not use all of its parameters
                bucket.submit(self._scales()[0], self.op)
        used = torch.zeros(len(self.params), dtype=torch.int32)
        used[list(self.used)] = 1
        used_handle = hvd.allreduce_async_(used, name=f"{self.name}.used", op=hvd.Sum)
        for bucket in self.buckets:
            bucket.collect(self._scales()[1])
        wait_for(used_handle)
        for number in used.eq(0).nonzero().flatten().tolist():
            self.params[number].grad = None  # no rank used it, so it stays as it is
        self._wait_for_totals()

    def totals_and_norm(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See Sharing."""
        return self.totals, norm_of(grads)

    def _scales(self) -> tuple[float, float]:
        """What a bucket is multiplied by before and after its journey. 1 unless the sum would be wrong or too large."""
        if self.op == hvd.Sum and not self.compressed:
            return 1.0, 1.0
        self._wait_for_totals()
        weight = float(self.totals[1])
        if self.op == hvd.Sum:
            # Near the mean, whose size fp16 can hold; a power of two, which costs no bit.
            power = 2.0 ** round(math.log2(weight)) if 0 < weight < math.inf else 1.0
            return 1 / power, power
        own = float(self.own_weight)
        return (1 / own if own else 0.0), weight

    def _wait_for_totals(self) -> None:
        if self.totals_handle is not None:
            wait_for(self.totals_handle)
            self.totals_handle = None


def plan(params: Sequence[Tensor], limit_bytes: float) -> list[list[int]]:
    """Which parameters share a bucket: neighbours of one dtype, the last first, as backward reaches them."""
    buckets: list[list[int]] = []
    open_ones: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for number in reversed(range(len(params))):
        param = params[number]
        key = (param.dtype, param.device)
        members, size = open_ones.get(key, ([], 0))
        if not members or size + param.nbytes > limit_bytes:
            members, size = [], 0
            buckets.append(members)
        members.append(number)
        open_ones[key] = (members, size + param.nbytes)
    return buckets


def wait_for(handle: int) -> None:
    """Wait for an operation of Horovod. Raises RankFailed where another rank is gone."""
    try:
        hvd.synchronize(handle)
    except HorovodInternalError as error:
        said = str(error).strip().partition(". ")[0]
        raise RankFailed(f"another rank of the run is gone or does not answer: Horovod says {said!r}") from error
