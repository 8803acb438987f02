"""Collectives between the ranks of a run, as few as the engine and the control plane need."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """One rank among `size`. These collectives do nothing where a rank is alone, and else are torch.distributed's."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """True on the rank that speaks for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """Replace a tensor by rank 0's."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def share(self, text: str) -> str:
        """Rank 0's text on every rank."""
        if self.size == 1:
            return text
        data = np.frombuffer(text.encode(), dtype=np.uint8).copy()
        length = torch.tensor([len(data)])
        self.broadcast(length)
        letters = torch.from_numpy(data) if self.first else torch.empty(int(length), dtype=torch.uint8)
        self.broadcast(letters)
        return letters.numpy().tobytes().decode()

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.sum(torch.zeros(1))
