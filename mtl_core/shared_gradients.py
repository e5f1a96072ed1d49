"""Data parallelism between processes of one machine: gradients are summed in memory they share.

Gloo sends what it sums through sockets, also to the process next door; of a step of a small encoder
that is a quarter. Here a rank copies its gradient into memory that all ranks have mapped, averages
its share of the parameters over all of them, and copies the other shares from who averaged them:
a reduce-scatter and an all-gather without messages.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_core.optim import total_norm


class SharedGradients:
    """Means of gradients over ranks; every rank makes and calls it at the same places.

    A rank that dies makes the others' barriers fail, as it would make gloo's own sum fail.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], memory: Tensor, rank: int, size: int
    ) -> None:
        self.parameters, self.rank = parameters, rank
        sizes = [parameter.numel() for parameter in parameters]
        self.rows = [
            [part.view(p.shape) for part, p in zip(row.split(sizes), parameters, strict=True)]
            for row in memory[:-size].view(size, -1)
        ]
        """Rank → its gradient of each parameter."""
        self.norms = memory[-size:]
        """Rank → the norm of the means that it has taken."""
        self.owners = even_shares(sizes, size)
        """Rank that averages the gradients of each parameter, in its own row."""

    @classmethod
    def open(
        cls, parameters: Sequence[nn.Parameter], rank: int, size: int
    ) -> SharedGradients | None:
        """Start all ranks from the first one's parameters, as DistributedDataParallel does.

        None on every rank, and nothing done, if one of them cannot map the first one's memory: on
        another machine, on a system that is not Linux.
        """
        numbers = size * (sum(parameter.numel() for parameter in parameters) + 1)
        with contextlib.ExitStack() as opened:
            told = [_offer(opened) if rank == 0 else None]
            dist.broadcast_object_list(told, src=0)
            memory = None if told[0] is None else _map(*told[0], numbers)
            mapped = torch.tensor(int(memory is not None))
            dist.all_reduce(mapped, dist.ReduceOp.MIN)
        if memory is None or not mapped:
            return None
        for parameter in parameters:
            dist.broadcast(parameter.detach(), src=0)
        return cls(parameters, memory, rank, size)

    @torch.no_grad()
    def average(self) -> Tensor:
        """Make every parameter's gradient the mean over ranks; on all the same to the last bit.

        A rank's own share stays in the shared memory, where no other looks until the next call.

        Returns:
            () the norm of all means, to the last bit the same as well.
        """
        mine = self.rows[self.rank]
        private = [cast(Tensor, parameter.grad) for parameter in self.parameters]
        torch._foreach_copy_(mine, private)
        dist.barrier()
        owned = [index for index, owner in enumerate(self.owners) if owner == self.rank]
        means = [mine[index] for index in owned]
        others = [row for row in self.rows if row is not mine]
        for seen, row in enumerate(others if means else (), start=1):  # a rank may own nothing
            torch._foreach_lerp_(means, [row[index] for index in owned], 1 / (seen + 1))
        self.norms[self.rank] = total_norm(means)
        dist.barrier()
        norm: Tensor = self.norms.norm()
        for index, owner in enumerate(self.owners):
            if owner == self.rank:
                self.parameters[index].grad = mine[index]
            else:
                private[index].copy_(self.rows[owner][index])
        dist.barrier()
        return norm


def even_shares(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each parameter: the largest first, to whom has the fewest numbers so far."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners


def _offer(opened: contextlib.ExitStack) -> tuple[str, str] | None:
    """Memory without a name in any file system: where others find it, and what they see there.

    It lives as long as a process has it mapped. None where the system has no such memory to give.
    """
    try:
        descriptor = os.memfd_create(f"gradients-{uuid.uuid4()}")
        opened.callback(os.close, descriptor)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        return path, os.readlink(path)
    except (AttributeError, OSError):
        return None


def _map(path: str, name: str, numbers: int) -> Tensor | None:
    """The memory of another process at this path, unless it is none of that name.

    On another machine the path may lead to anything, which must not be opened.
    """
    try:
        if os.readlink(path) != name:
            return None
        return torch.from_file(path, shared=True, size=numbers, dtype=torch.float32)
    except (OSError, RuntimeError):
        return None
