"""What each task wants of the parameters: its own gradient of a whole optimiser step.

Shapes: K tasks of the step, P numbers in all parameters together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtl_core.world import World

Gram = NDArray[np.float64]
"""(K, K) inner products of the tasks' gradients."""


class TaskGradients:
    """A row a task: micro-batches add to it, then ranks do.

    `torch.autograd.grad` is asked instead of `backward`, so `.grad` stays as it was and
    DistributedDataParallel, whose hooks sit where `.grad` is filled, sees nothing.
    """

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.tasks: list[str] = []
        self.buffer = torch.empty(0, 0)

    def begin(self, parameters: Sequence[nn.Parameter], tasks: Sequence[str]) -> None:
        """Start a step that holds labels of these tasks, in the last one's memory if it fits."""
        self.parameters, self.tasks = list(parameters), list(tasks)
        width = sum(parameter.numel() for parameter in parameters)
        if len(self.buffer) < len(tasks) or self.buffer.shape[1] != width:
            device = parameters[0].device if parameters else None
            self.buffer = torch.empty(len(tasks), width, device=device)
        self.rows.zero_()

    @property
    def rows(self) -> Tensor:
        """(K, P)."""
        return self.buffer[: len(self.tasks)]

    def add(self, losses: Mapping[str, Tensor], keep_graph: bool) -> None:
        """Add what a micro-batch's losses give; `keep_graph` if they are differentiated again."""
        left = {task: loss for task, loss in losses.items() if loss.requires_grad}
        while left and self.parameters:
            task, loss = left.popitem()
            found = torch.autograd.grad(
                loss, self.parameters, retain_graph=keep_graph or bool(left), allow_unused=True
            )
            places = self.views(self.rows[self.tasks.index(task)])
            used = [i for i, gradient in enumerate(found) if gradient is not None]
            if used:
                torch._foreach_add_([places[i] for i in used], [found[i] for i in used])

    def views(self, flat: Tensor) -> list[Tensor]:
        """(P,) → a view in the shape of each parameter."""
        parts = torch.split(flat, [parameter.numel() for parameter in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def reduce(self, world: World) -> None:
        """Make the rows those of the whole step; losses are scaled for a mean over ranks."""
        if world.size > 1 and self.parameters:  # a backend for GPUs takes no empty CPU tensor
            world.all_reduce(self.rows)
            self.rows.div_(world.size)

    def gram(self, width: int | None = None) -> Gram:
        """Inner products over the first `width` columns, or all."""
        rows = self.rows[:, :width]
        return (rows @ rows.T).double().cpu().numpy()


def cosines(tasks: Sequence[str], gram: Gram) -> dict[tuple[str, str], float]:
    """Cosine of each pair of tasks of which both have a gradient."""
    norms = np.sqrt(np.diag(gram))
    return {
        (tasks[i], tasks[j]): float(gram[i, j] / (norms[i] * norms[j]))
        for i, j in combinations(range(len(tasks)), 2)
        if norms[i] > 0 and norms[j] > 0
    }


def pcgrad_coefficients(gram: Gram, random: np.random.Generator) -> NDArray[np.float64]:
    """How often each task's gradient is in the sum of the projected ones.

    Algorithm 1 of Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020: each task's
    gradient loses, one other task after the other in random order, its part along that task's
    original gradient where the two point against each other. What comes out of it stays within the
    span of the tasks' gradients, so inner products are all it needs.

    Returns:
        (K,) factors, all 1 when no two gradients conflict.
    """
    total = np.zeros(len(gram))
    for task in range(len(gram)):
        mine = np.zeros(len(gram))
        mine[task] = 1.0
        for other in random.permutation([o for o in range(len(gram)) if o != task]).astype(int):
            overlap = mine @ gram[:, other]
            if overlap < 0 < gram[other, other]:
                mine[other] -= overlap / gram[other, other]
        total += mine
    return total
