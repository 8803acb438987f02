"""One optimizer step in torch, and state in and out: accumulation, clipping, the finite check and AdamW, defined once.

A strategy builds a model and says how its ranks share it (`Sharing`); everything else is here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unitrain.batch import Batch, MicroBatch
from unitrain.cursor import rank_rows
from unitrain.digest import box_digest
from unitrain.errors import CheckpointMismatch, UserError
from unitrain.losses import ArrayKind, as_loss, check_parts
from unitrain.recipe import Recipe
from unitrain.strategies._torch_optimizer import Optimizer, make_optimizer
from unitrain.strategies._torch_ranks import Ranks
from unitrain.strategy import (
    Engine,
    HyperParameters,
    LoadReport,
    LossFunction,
    Metrics,
    Role,
    Shard,
    ShardReader,
    StepOut,
)

COMPUTE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSORS = ArrayKind("Tensor", lambda value: isinstance(value, Tensor))
FP16_FIRST_SCALE, FP16_GROWTH_STEPS = 2.0**16, 2000  # torch.amp.GradScaler's


class Sharing:
    """How ranks share one model. This one: not at all; the others override what differs.

    `module(loss name, micro-batch)` is one forward pass; gradients, totals and the norm it leads to may all be
    divided by one constant (the number of ranks), which cancels in the update.
    """

    writes = True  # False on ranks whose sharded boxes another rank writes
    divisor = 1  # by which gradients and totals were divided
    unused: Collection[int] = ()  # parameters that no rank's rows led to in this update, though they have a gradient

    def __init__(self, losses: LossModule) -> None:
        self.losses = losses
        self.module: Callable[[str, MicroBatch], Tensor] = losses

    def before_update(self, loss: str, first: MicroBatch) -> None:
        """Called once an update, before its first forward pass."""

    def before_micro(self, last: bool) -> None:
        """Called before each forward pass of an update; ranks exchange gradients in the last one only."""

    def totals_and_norm(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """([sum of losses, sum of weights], L2 norm of the gradients) over all ranks, without waiting."""
        totals = self.losses.totals
        assert totals is not None, "a backward pass came before"
        return totals, norm_of(grads)

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter, gradient or moment, as a plain tensor that shares its memory."""
        return tensor

    def offset(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Where `local(tensor)` begins in the whole; None where every rank holds the whole."""
        return None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that runs the model outside of an update."""
        return function(*args)

    def after_forward_only(self) -> None:
        """Called after evaluation and generation, and before state is read or written."""


class LossModule(nn.Module):
    """A role's losses as forward passes of one module, so that a wrapper (DDP) sees loss and model as a whole.

    With `carry` the sums travel inside the gradient: a parameter that is multiplied by [sum of losses, sum of
    weights] has just these as its gradient, which the wrapper accumulates and reduces with all others. That
    makes the global weight known on every rank without a collective of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Mapping[str, LossFunction],
        device: torch.device,
        *,
        precision: str,
        carry: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.functions, self.compute, self.device_type = losses, COMPUTE[precision], device.type
        self.known: set[str] = set()  # losses that have returned what they should
        self.totals: Tensor | None = None
        self.metrics: dict[str, Tensor] = {}
        self.scale: Tensor | None = None  # fp16 only
        # Last, so that it falls into the bucket that is reduced first.
        self.carry = nn.Parameter(torch.zeros(2, device=device)) if carry else None

    def start(self) -> None:
        """Forget the sums of the last update."""
        self.totals, self.metrics = None, {}

    def measured(self, name: str, micro: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss sum, [sum, weight] in fp32 detached, and each metric's [sum, weight]."""
        with _autocast(self.device_type, self.compute):
            found = self.functions[name](self.model, micro.arrays)
        loss = as_loss(found, micro.rows, name, TENSORS)
        if name not in self.known:
            check_parts(loss, name, TENSORS)
            self.known.add(name)
        total = loss.sum.float()
        pair = _pair(total, loss.weight, total)
        metrics = {key: _pair(amount, weight, total) for key, (amount, weight) in loss.metrics.items()}
        if micro.filler:
            total, pair = total * 0.0, pair * 0.0
            metrics = {key: value * 0.0 for key, value in metrics.items()}
        return total, pair, metrics

    def forward(self, name: str, micro: MicroBatch) -> Tensor:
        """What backward starts from; the sums are kept aside."""
        total, pair, metrics = self.measured(name, micro)
        if self.carry is None and not total.requires_grad:
            raise UserError(
                f"the loss function {name!r} returned a loss that no trainable parameter leads to; compute it from the "
                "model's output, without torch.no_grad() or detach()"
            )
        self.totals = pair if self.totals is None else self.totals + pair
        for key, value in metrics.items():
            self.metrics[key] = self.metrics[key] + value if key in self.metrics else value
        if self.scale is not None:
            total = total * self.scale
        if self.carry is not None:
            total = total + (self.carry * pair).sum()
        return total


class TorchStepOut(StepOut):
    """Device scalars of one update."""

    def __init__(
        self, totals: Tensor, divisor: int, grad_norm: Tensor, skipped: Tensor, metrics: dict[str, Tensor], ranks: Ranks
    ) -> None:
        self.totals, self.divisor, self.grad_norm, self.skipped = totals, divisor, grad_norm, skipped
        self.metrics, self.ranks = metrics, ranks

    @property
    def loss(self) -> Tensor:
        """Mean loss over the global batch, a device scalar."""
        return self.totals[0] / self.totals[1]

    def read(self) -> dict[str, float]:
        """See StepOut."""
        total, weight, norm, skipped = torch.stack((*self.totals, self.grad_norm, self.skipped)).tolist()
        values = {
            "loss": total / weight if weight else float("nan"),
            "weight": weight * self.divisor,
            "grad_norm": norm,
            "applied": 1.0 - skipped,
        }
        values.update({key: s / w for key, (s, w) in _reduced(self.metrics, self.ranks).items() if w})
        return values

    def verdict(self) -> tuple[float, bool]:
        """See StepOut."""
        total, weight, skipped = torch.stack((*self.totals, self.skipped)).tolist()
        return total / weight if weight else float("nan"), not skipped


class TorchEngine(Engine):
    """One torch model and its optimizer; `sharing` says how ranks hold them."""

    def __init__(self, model: nn.Module, role: Role, sharing: Sharing, recipe: Recipe, ranks: Ranks) -> None:
        self.model, self.role, self.sharing, self.ranks = model, role, sharing, ranks
        self.losses = sharing.losses
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        self.names = [name for name, _ in named]
        self.trained = set(self.names)
        self.params = [param for _, param in named]
        kept = set(model.state_dict(keep_vars=True))
        self.buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
        self.device = sharing.local(self.params[0]).device if named else _device_of(model)
        own = [model] if hasattr(model, "manual_seed") else []  # it draws from generators of its own
        self.generators: list[Any] = [*_generators(self.device), *own]
        if role.optimizer is not None and not named:
            raise UserError("a role has an optimizer but its model has no trainable parameter; use optimizer: None")
        self.optimizer = self._make_optimizer(recipe)
        if recipe.train.precision == "fp16":
            self.losses.scale = torch.tensor(FP16_FIRST_SCALE, device=self.device)
            self.good_steps = torch.zeros(1, dtype=torch.int32, device=self.device)

    def _make_optimizer(self, recipe: Recipe) -> Optimizer | None:
        """What moves this rank's parameters; None where nothing does, or where a backend keeps it to itself."""
        if self.role.optimizer is None:
            return None
        with torch.no_grad():
            local = [self.sharing.local(param) for param in self.params]
        params: list[Tensor] = list(self.params)
        return make_optimizer(self.role.optimizer, self.names, params, local, recipe.optimizer.lr)

    def update(self, batch: Batch, hp: HyperParameters, loss: str = "loss") -> TorchStepOut:
        """See Engine."""
        if self.role.optimizer is None:
            raise UserError("this role has no optimizer, so it cannot be updated; give Role(optimizer=...)")
        if not self.model.training:
            self.model.train()
        for param in self.params:
            param.grad = None  # also drops what the losses of other roles left here
        self.losses.start()
        micros = batch.micro()
        self.sharing.before_update(loss, micros[0])
        for number, micro in enumerate(micros, start=1):
            self.sharing.before_micro(number == len(micros))
            self._seed(micro.key)
            self.sharing.module(loss, micro).backward()  # type: ignore[no-untyped-call]  # torch's own
        return self._apply(hp)

    @torch.no_grad()
    def _apply(self, hp: HyperParameters) -> TorchStepOut:
        """Clip, check, update: all on the device."""
        assert self.optimizer is not None, "checked by update"
        local = self.sharing.local
        grads = [None if param.grad is None else local(param.grad) for param in self.params]
        present = [grad for grad in grads if grad is not None]
        totals, raw_norm = self.sharing.totals_and_norm(present)
        for number in self.sharing.unused:
            grads[number] = self.params[number].grad = None
        # What turns gradients of sums into the gradient of the mean; exact where the weight is a power of two.
        inverse = totals[1].reciprocal()
        if self.losses.scale is not None:
            inverse = inverse / self.losses.scale
        norm = raw_norm * inverse
        skip = norm.isfinite().logical_not_().float()
        factor = inverse if hp.clip is None else (hp.clip / (norm + 1e-6)).clamp_(max=1.0) * inverse
        torch._foreach_mul_(present, factor)
        self.optimizer.apply([local(param) for param in self.params], grads, hp.lr, skip)
        if self.losses.scale is not None:
            torch._amp_update_scale_(self.losses.scale, self.good_steps, skip, 2.0, 0.5, FP16_GROWTH_STEPS)
        return TorchStepOut(totals, self.sharing.divisor, norm, skip, self.losses.metrics, self.ranks)

    def evaluate(self, batches: Iterable[Batch], loss: str = "loss") -> Metrics:
        """See Engine."""
        # In fp64: a sweep may count more than the 2**24 tokens up to which fp32 counts exactly.
        sums: dict[str, Tensor] = {"loss": torch.zeros(2, dtype=torch.float64, device=self.device)}
        with self._forward_only():
            for batch in batches:
                for micro in batch.micro():
                    self._seed(micro.key)
                    _, pair, metrics = self.sharing.run(self.losses.measured, loss, micro)
                    for name, value in {"loss": pair, **metrics}.items():
                        sums[name] = sums[name] + value if name in sums else value.double()
        return _reduced(sums, self.ranks)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """See Engine."""
        with self._forward_only(), _autocast(self.losses.device_type, self.losses.compute):
            return self.sharing.run(function, self.model, *args)

    def shards(self, kinds: Collection[str] | None = None) -> Iterator[Shard]:
        """See Engine."""
        self._share_buffers()
        for place in self._places():
            if self._in_checkpoint(place) and (kinds is None or place.kind in kinds):
                box = self._written(place)
                if box is not None:
                    data, offset = box
                    yield Shard(place.name, place.kind, _dtype_name(data), place.shape, offset, _to_numpy(data))

    def load(self, reader: ShardReader, kinds: Collection[str] | None = None) -> LoadReport:
        """See Engine."""
        present = {pair: info for pair, info in reader.tensors.items() if kinds is None or pair[0] in kinds}
        if self.optimizer is not None:
            self.optimizer.prepare({pair: info.shape for pair, info in present.items()})
        # Dictionaries without values: sets that keep their order, for a tensor may lie in several places.
        loaded: dict[tuple[str, str], None] = {}
        missing: dict[tuple[str, str], None] = {}
        for place in self._places(writing=True):
            pair = (place.kind, place.name)
            if not self._in_checkpoint(place) or (kinds is not None and place.kind not in kinds):
                continue
            if pair not in present:
                missing[pair] = None
                continue
            info = present[pair]
            if tuple(info.shape) != place.shape:
                raise CheckpointMismatch(
                    f"{place.kind} {place.name} has shape {tuple(info.shape)} in the checkpoint and {place.shape} in "
                    "this model; resume with the recipe that wrote it"
                )
            loaded[pair] = None
            if place.offset is not None and not place.data.numel():
                continue  # this rank has no part of it
            offset = place.offset or (0,) * place.data.ndim
            box = reader.read(place.kind, place.name, offset, tuple(place.data.shape))
            with torch.no_grad():
                place.data.copy_(_from_numpy(box, info.dtype))
        self.sharing.after_forward_only()
        return LoadReport(list(loaded), list(missing), sorted(set(present) - set(loaded)))

    def digest(self) -> dict[str, int]:
        """See Engine."""
        self._share_buffers()
        sums: dict[str, int] = {}
        for place in self._places():
            if place.kind in ("param", "buffer"):
                box = self._written(place)
                part = 0 if box is None else box_digest(_to_numpy(box[0]), place.shape, box[1])
                sums[place.name] = (sums.get(place.name, 0) + part) % 2**64
        # int64 addition wraps modulo 2**64, which is the sum that a digest is
        total = torch.from_numpy(np.array(list(sums.values()), dtype=np.uint64).view(np.int64))
        self.ranks.sum(total)
        return dict(zip(sums, total.numpy().view(np.uint64).tolist(), strict=True))

    def replicas(self) -> dict[str, list[int]]:
        """See Engine. Buffers are left out: running statistics differ by rank until they are shared."""
        if self.ranks.size == 1:
            return {}
        whole = [place for place in self._places() if place.kind != "buffer" and place.offset is None]
        hashes = [box_digest(_to_numpy(place.data), place.shape, (0,) * len(place.shape)) for place in whole]
        table = torch.zeros((self.ranks.size, len(whole)), dtype=torch.int64)
        table[self.ranks.rank] = torch.from_numpy(np.array(hashes, dtype=np.uint64).view(np.int64))
        self.ranks.sum(table)
        columns = table.numpy().view(np.uint64).T.tolist()
        return {f"{place.kind} {place.name}": column for place, column in zip(whole, columns, strict=True)}

    def _places(self, *, writing: bool = False) -> Iterator[Place]:
        """Every tensor of the state, in one or more places each, in an order that is the same on all ranks.

        With `writing` the caller changes the places' data, each before it asks for the next.
        """
        sharing = self.sharing
        sharing.after_forward_only()  # another role's loss may have run this model last
        for name, param in self.model.named_parameters():
            yield Place("param", name, sharing.local(param.detach()), tuple(param.shape), sharing.offset(param))
        for name, buffer in self.buffers:
            yield Place("buffer", name, buffer, tuple(buffer.shape), None)
        by_name = dict(zip(self.names, self.params, strict=True))
        for slot in self.optimizer.slots() if self.optimizer else ():
            param = by_name[slot.name]
            if slot.whole:
                yield Place(slot.kind, slot.name, slot.tensor, tuple(slot.tensor.shape), None)
            else:
                local = sharing.local(slot.tensor)
                yield Place(slot.kind, slot.name, local, tuple(param.shape), sharing.offset(param))
        if self.losses.scale is not None:
            yield Place("fp16.scale", "*", self.losses.scale, (), None)
            yield Place("fp16.good_steps", "*", self.good_steps, (1,), None)

    def _in_checkpoint(self, place: Place) -> bool:
        """False for frozen parameters of a role that keeps only what is trained."""
        return self.role.checkpoint == "all" or place.kind != "param" or place.name in self.trained

    def _written(self, place: Place) -> tuple[Tensor, tuple[int, ...]] | None:
        """The box that this rank contributes of a tensor, if any. Replicas share the work by rows."""
        data = place.data
        if place.offset is not None:
            return (data, place.offset) if self.sharing.writes and data.numel() else None
        if not data.ndim or not data.numel():
            return (data, (0,) * data.ndim) if self.ranks.first else None
        rows = rank_rows(data.shape[0], self.ranks.rank, self.ranks.size)
        if not rows:
            return None
        return data[rows.start : rows.stop], (rows.start, *(0 for _ in data.shape[1:]))

    def _share_buffers(self) -> None:
        """Rank 0's buffers everywhere: running statistics differ by rank, and one set is evaluated and saved."""
        for _, buffer in self.buffers:
            self.ranks.broadcast(buffer)

    @contextlib.contextmanager
    def _forward_only(self) -> Iterator[None]:
        self._share_buffers()
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.sharing.after_forward_only()

    def _seed(self, key: int) -> None:
        """Randomness (dropout) is a function of the seed, the step and the place in the batch; nothing to save."""
        for generator in self.generators:
            generator.manual_seed(key)


class Place(NamedTuple):
    """Where a named logical tensor, or a box of it, lives on this rank."""

    kind: str
    name: str
    data: Tensor  # this rank's part, live
    shape: tuple[int, ...]  # of the whole
    offset: tuple[int, ...] | None  # of `data` in the whole; None: every rank holds the whole


def norm_of(grads: list[Tensor]) -> Tensor:
    """L2 norm over tensors, a scalar; the order of operations is torch.nn.utils.get_total_norm's."""
    if not grads:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return norm


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch's own; generators exist after it
        generators.append(torch.cuda.default_generators[device.index])
    return generators


def _autocast(device_type: str, compute: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device_type, compute) if compute is not None else _NO_AUTOCAST


_NO_AUTOCAST: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def _pair(amount: Any, weight: Any, like: Tensor) -> Tensor:
    """[sum, weight] in fp32 on the loss's device, detached, without waiting for the device."""
    parts = [
        part.detach().float() if isinstance(part, Tensor) else like.new_full((), float(part), requires_grad=False)
        for part in (amount, weight)
    ]
    return torch.stack(parts)


def _reduced(sums: Mapping[str, Tensor], ranks: Ranks) -> Metrics:
    """(sum, weight) of each name over all ranks."""
    if not sums:
        return {}
    names = sorted(sums)
    table = torch.stack([sums[name] for name in names]).double()
    ranks.sum(table)
    return {name: (amount, weight) for name, (amount, weight) in zip(names, table.tolist(), strict=True)}


def _dtype_name(data: Tensor) -> str:
    return str(data.dtype).removeprefix("torch.")


def _to_numpy(data: Tensor) -> NDArray[Any]:
    """A C-contiguous array that shares memory where it can; bfloat16 travels as its bits."""
    data = data.detach().contiguous().cpu()
    return (data.view(torch.uint16) if data.dtype == torch.bfloat16 else data).numpy()


def _from_numpy(box: NDArray[Any], dtype: str) -> Tensor:
    tensor = torch.from_numpy(box if box.flags.writeable else box.copy())
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
