"""This process among the data-parallel ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank; every rank must ask."""
        ranks = torch.tensor([float(here)], device=self.device)
        return bool(self.all_reduce(ranks).item() > 0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
