"""Replicas of a model under DistributedDataParallel, whoever wrapped it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from unitrain.batch import MicroBatch
from unitrain.errors import Refused
from unitrain.strategies._torch_engine import LossModule, Sharing, norm_of


def leave_buffers_alone(losses: LossModule) -> None:
    """Say to DistributedDataParallel, before it wraps: buffers are shared when they are read (evaluation,
    checkpoints), not in every forward pass.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        losses, [name for name, _ in losses.named_buffers()]
    )


class Replicated(Sharing):
    """Replicas under DistributedDataParallel, which divides all that it sums by the number of ranks."""

    def __init__(self, losses: LossModule, ddp: DistributedDataParallel, ranks: int) -> None:
        super().__init__(losses)
        self.ddp = ddp
        self.module = ddp
        self.divisor = ranks
        self.rehearsed: set[str] = set()

    def before_update(self, loss: str, first: MicroBatch) -> None:
        """Run the first backward pass once for nothing, where the order of a sum matters.

        DDP lays its buckets out anew after the first backward pass. From three ranks on, a sum's last bits depend
        on that layout, and a resumed run would differ from an uninterrupted one in its first step.
        """
        if loss in self.rehearsed or self.divisor < 3:
            return
        self.rehearsed.add(loss)
        kept = [(buffer, buffer.clone()) for buffer in self.losses.buffers()]
        self.ddp(loss, first).backward()
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for param in self.losses.parameters():
            param.grad = None
        self.losses.start()

    def before_micro(self, last: bool) -> None:
        """See Sharing."""
        # The flag behind no_sync(), without a context a micro-batch.
        self.ddp.require_backward_grad_sync = last

    def totals_and_norm(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See Sharing."""
        self._refuse_unused()
        carry = self.losses.carry
        assert carry is not None and carry.grad is not None, "the loss was multiplied by it"
        # A copy: the gradient lies in a bucket of DDP's, which the next update overwrites.
        totals, carry.grad = carry.grad.clone(), None
        return totals, norm_of(grads)

    def _refuse_unused(self) -> None:
        """Raise Refused where DistributedDataParallel still waits for a gradient, and has summed nothing."""
        try:
            self.ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]  # torch's own
        except RuntimeError as error:
            params = self.losses.model.named_parameters()
            names = [name for name, param in params if param.requires_grad and param.grad is None]
            what = f"the parameter {names[0]!r}" if names else "a parameter"
            raise Refused(
                f"{what} got no gradient in the last pass of a step; set find_unused_parameters: true in the options "
                "of --strategy ddp, or use --strategy fsdp2 or horovod"
            ) from error
