"""ZeRO's flat partitions as named boxes: what this rank holds of each master weight and moment, to read and to write.

DeepSpeed flattens parameters, pads them and cuts them where it likes. A flat interval of an n-dimensional tensor is
at most 2n - 1 boxes, so a checkpoint sees neither the padding nor the cuts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unitrain.errors import CheckpointMismatch
from unitrain.recipe import OptimizerRecipe
from unitrain.strategies._torch_engine import Place

MOMENTS = {"adamw": {"adamw.m": "exp_avg", "adamw.v": "exp_avg_sq"}, "sgd": {"sgd.momentum": "momentum_buffer"}}
STEP_KIND = "adamw.step"


class Box(NamedTuple):
    """A box of a tensor: where it begins and how far it reaches."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def boxes_of(shape: tuple[int, ...], begin: int, end: int) -> list[Box]:
    """The boxes that elements begin..end of a flattened tensor make up, in flat order."""
    if begin >= end:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    if begin % row == 0 and end % row == 0:
        return [Box((begin // row, *(0 for _ in shape[1:])), ((end - begin) // row, *shape[1:]))]
    first_whole, last_whole = -(-begin // row), end // row
    if first_whole > last_whole:  # inside one row
        return _in_row(shape, begin // row, begin % row, end % row)
    return [
        *(_in_row(shape, begin // row, begin % row, row) if begin % row else ()),
        *boxes_of(shape, first_whole * row, last_whole * row),
        *(_in_row(shape, last_whole, 0, end % row) if end % row else ()),
    ]


def _in_row(shape: tuple[int, ...], row: int, begin: int, end: int) -> list[Box]:
    return [Box((row, *box.offset), (1, *box.shape)) for box in boxes_of(shape[1:], begin, end)]


class Part(NamedTuple):
    """One parameter's interval in this rank's flat tensors."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    begin: int  # in the flattened parameter
    start: int  # in the flat tensors
    size: int  # elements; 0 where other ranks hold them all


class Group(NamedTuple):
    """Flat tensors that one call of the optimizer moves."""

    master: Tensor  # fp32 weights
    state: dict[str, Any]  # the optimizer's: moments, and the count of updates
    parts: list[Part]


class Partitions(ABC):
    """This rank's partitions of one DeepSpeed ZeRO optimizer."""

    def __init__(self, zero: Any, names: Mapping[nn.Parameter, str]) -> None:
        self.zero, self.names = zero, names

    @abstractmethod
    def groups(self, *, writing: bool = False) -> Iterator[Group]:
        """All groups, each usable until the next is asked for. With `writing`, what the caller changes is kept."""

    @abstractmethod
    def refresh(self) -> None:
        """Make the weights that forward passes use from the masters. A collective."""

    @abstractmethod
    def clear_gradients(self) -> None:
        """Forget the last update's gradients, which would stay where a parameter gets none in the next."""

    def _share(self, working: Tensor, master: Tensor) -> None:
        """Let a master lie where the weights it is copied to lie: of the same precision they are the same numbers."""
        if master.numel() and (working.dtype, working.device) == (master.dtype, master.device):
            master.data = working.data

    def before_step(self) -> None:  # noqa: B027 - most need nothing
        """Called when all gradients are there, before DeepSpeed moves parameters."""

    def start_state(self, recipe: OptimizerRecipe) -> None:
        """Make the optimizer's state, which it would make in its first step; a resumed run needs it before."""
        for group in self.groups(writing=True):
            if recipe.name == "adamw":
                # DeepSpeedCPUAdam counts in Python, torch's fused kernel on the device.
                counts_in_python = hasattr(self.zero.optimizer, "ds_opt_adam")
                group.state["step"] = 0 if counts_in_python else torch.zeros((), device=group.master.device)
            if recipe.name == "adamw" or recipe.momentum:
                for key in MOMENTS[recipe.name].values():
                    group.state[key] = torch.zeros_like(group.master, requires_grad=False)

    @torch.no_grad()
    def fill(self, value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Set the masters from whole fp32 tensors, asked for by name and shape one at a time."""
        for group in self.groups(writing=True):
            for part in group.parts:
                if part.size:
                    whole = value(part.name, part.shape).reshape(-1)
                    group.master.narrow(0, part.start, part.size).copy_(whole[part.begin : part.begin + part.size])
        self.refresh()

    def places(self, recipe: OptimizerRecipe, *, writing: bool) -> Iterator[Place]:
        """Masters, moments and counts of updates under their parameters' names."""
        moments = MOMENTS[recipe.name] if recipe.name == "adamw" or recipe.momentum else {}
        for group in self.groups(writing=writing):
            flat = {"param": group.master, **{kind: group.state[key] for kind, key in moments.items()}}
            counts = {}
            for part in group.parts:
                for kind, tensor in flat.items():
                    yield from _part_places(kind, part, tensor.detach())
                if recipe.name == "adamw":
                    count = torch.tensor(float(group.state["step"]), dtype=torch.float32)
                    counts[part.name] = count
                    yield Place(STEP_KIND, part.name, count, (), None)
            if writing and counts:
                _set_count(group.state, counts)
        if writing:
            self.refresh()


class ReplicatedWeights(Partitions):
    """ZeRO-1 and 2: whole weights on every rank; masters and moments partitioned by parameter group."""

    def __init__(self, zero: Any, names: Mapping[nn.Parameter, str]) -> None:
        super().__init__(zero, names)
        if not zero.cpu_offload:
            for number, master in enumerate(zero.single_partition_of_fp32_groups):
                rank = dist.get_rank(zero.real_dp_process_group[number])
                self._share(zero.parallel_partitioned_bit16_groups[number][rank], master)
            zero._link_all_hp_params()  # it had remembered where the masters lay before

    def groups(self, *, writing: bool = False) -> Iterator[Group]:
        """See Partitions."""
        zero = self.zero
        for number, master in enumerate(zero.single_partition_of_fp32_groups):
            # Not param._hp_mapping, which leaves the order of round_robin_gradients out of account.
            placed = zip(zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True)
            first = dist.get_rank(zero.real_dp_process_group[number]) * master.numel()
            parts = [self._part(param, offset, first, first + master.numel()) for param, offset in placed]
            yield Group(master, zero.optimizer.state[master], parts)

    def refresh(self) -> None:
        """See Partitions."""
        self.zero.update_lp_params()

    def clear_gradients(self) -> None:
        """See Partitions. Only offloaded gradients stay."""
        if self.zero.cpu_offload:
            for master in self.zero.single_partition_of_fp32_groups:
                master.grad.zero_()

    def _part(self, param: nn.Parameter, offset: int, first: int, last: int) -> Part:
        """What elements first..last of a flat group hold of the parameter that lies at `offset` in it."""
        begin, end = max(offset, first), min(offset + param.numel(), last)
        if begin >= end:
            return Part(self.names[param], tuple(param.shape), 0, 0, 0)
        return Part(self.names[param], tuple(param.shape), begin - offset, begin - first, end - begin)


class PartitionedWeights(Partitions):
    """ZeRO-3: each parameter is cut into equal, padded intervals, one a rank; groups may lie on NVMe.

    Gradients do not: they have their place in memory anyway, and DeepSpeed reads them back wrong from NVMe where a
    parameter begins at no multiple of a disk block.
    """

    def __init__(self, zero: Any, names: Mapping[nn.Parameter, str]) -> None:
        super().__init__(zero, names)
        start = 0
        for number, master in enumerate(zero.fp32_partitioned_groups_flat):
            size = zero.fp16_partitioned_groups_flat_numel[number]
            if not zero._swappable_optimizer_subgroup(number):
                if (working := zero.fp16_partitioned_groups_flat[number]) is not None:
                    self._share(working, master)
                if master.grad is not None:
                    self._share(zero.grad_partitions_flat_buffer.narrow(0, start, size), master.grad)
            start += size
        if zero.swap_optimizer:
            zero.optimizer_swapper.swap_out_gradients = lambda **gradients: None

    def groups(self, *, writing: bool = False) -> Iterator[Group]:
        """See Partitions. A group on NVMe is read into memory for its turn, and written back if it may have changed."""
        zero = self.zero
        if writing:
            zero._partition_all_parameters()
        for number, params in enumerate(zero.fp16_groups):
            on_nvme = zero._swappable_optimizer_subgroup(number)
            if on_nvme:
                zero._optimizer_states_and_gradient_swap_in(number)
            master = zero.fp32_partitioned_groups_flat[number]
            yield Group(master, zero.optimizer.state[master], [self._part(param) for param in params])
            if writing:
                zero._reassign_or_swap_out_partitioned_parameters(number)
                if on_nvme:
                    zero._optimizer_states_and_gradient_swap_out(number)
            elif on_nvme:
                zero._release_swap_buffers(number)

    def refresh(self) -> None:
        """See Partitions. Working partitions were set group by group; small parameters are kept whole besides."""
        zero = self.zero
        if zero.persistent_parameters:
            zero._partition_all_parameters()
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()

    def clear_gradients(self) -> None:
        """See Partitions."""
        self.zero.grad_partitions_flat_buffer.zero_()
        if self.zero.offload_optimizer:
            for number, master in enumerate(self.zero.fp32_partitioned_groups_flat):
                if master.grad is not None and not self.zero._swappable_optimizer_subgroup(number):
                    master.grad.zero_()

    def before_step(self) -> None:
        """See Partitions. A group that is about to come from NVMe finds its gradients in memory."""
        zero, start = self.zero, 0
        for number, master in enumerate(zero.fp32_partitioned_groups_flat):
            size = zero.fp16_partitioned_groups_flat_numel[number]
            if zero._swappable_optimizer_subgroup(number):
                swapped = zero.optimizer_swapper._get_param_swap_info(master)
                swapped.unswapped_gradients = {0: zero.grad_partitions_flat_buffer.narrow(0, start, size)}
            start += size

    def _part(self, param: Any) -> Part:
        _, start, size = self.zero.grad_position[self.zero.get_param_id(param)]
        begin = min(self.zero._get_param_partition_rank(param) * size, param.ds_numel)
        return Part(self.names[param], tuple(param.ds_shape), begin, start, min(size, param.ds_numel - begin))


def _part_places(kind: str, part: Part, flat: Tensor) -> Iterator[Place]:
    """The boxes of one part, or an empty one: every rank names every tensor."""
    if not part.size:
        yield Place(kind, part.name, flat.narrow(0, 0, 0), part.shape, (0,) * len(part.shape))
    start = part.start
    for box in boxes_of(part.shape, part.begin, part.begin + part.size):
        count = math.prod(box.shape)
        yield Place(kind, part.name, flat.narrow(0, start, count).view(box.shape), part.shape, box.offset)
        start += count


def _set_count(state: dict[str, Any], counts: dict[str, Tensor]) -> None:
    """One count for all of a flat group. Raises CheckpointMismatch where its parameters' differ."""
    first, *others = counts
    for other in others:
        if counts[other] != counts[first]:
            raise CheckpointMismatch(
                f"the checkpoint counts {int(counts[first])} updates of {first} and {int(counts[other])} of {other}, "
                "but DeepSpeed keeps one count for both; resume with --strategy ddp or fsdp2"
            )
    if isinstance(state["step"], Tensor):
        state["step"].fill_(counts[first])
    else:
        state["step"] = int(counts[first])
