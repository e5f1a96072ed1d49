"""One encoder, a dict of heads; `forward` is the training entry point.

Shapes: B texts, L tokens, H hidden units, N labelled items of a task (texts or tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtl_core.encoder import SentenceEncoder
from mtl_core.heads import Head
from mtl_core.weighting import FixedWeighting, Weighting


@dataclass(frozen=True)
class Labelled:
    """What a batch holds for one task: where, and what is true there."""

    positions: Tensor
    """(N,) rows of the batch, or for token tasks positions in the flattened (B·L) tokens."""
    targets: Tensor
    """(N,) class or tag ids, or (N, C) zeros and ones for multilabel tasks."""


@dataclass(frozen=True)
class Batch:
    """Any set of texts; each task's labels stand only where a row carries them."""

    input_ids: Tensor
    """(B, L) int64."""
    attention_mask: Tensor
    """(B, L) int64."""
    labelled: dict[str, Labelled]
    states: Tensor | None = None
    """(B, L, H) cached states of the frozen lower layers, when they are computed once."""
    states_depth: int = 0
    """How many layers `states` has behind it."""

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(
            move(self.input_ids),
            move(self.attention_mask),
            {t: Labelled(move(x.positions), move(x.targets)) for t, x in self.labelled.items()},
            None if self.states is None else move(self.states),
            self.states_depth,
        )


class MultiTaskModel(nn.Module):
    """A shared encoder, a head per task, and the strategy that weighs their losses."""

    def __init__(
        self,
        encoder: SentenceEncoder,
        heads: Mapping[str, Head],
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict()
        # Past the checks for attribute names: a task may be called `type`, `values` or `v1.2`.
        self.heads._modules.update(heads)
        self.weighting = weighting or FixedWeighting({})

    def head(self, task: str) -> Head:
        head = self.heads[task]
        assert isinstance(head, Head)
        return head

    @property
    def head_items(self) -> list[tuple[str, Head]]:
        return [(name, self.head(name)) for name in self.heads]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Task → () sum of the losses of the items labelled in this batch, 0 without any."""
        return {
            task: self.head(task).loss_sum(logits, batch.labelled[task].targets)
            for task, logits in self.logits(batch).items()
        }

    def logits(self, batch: Batch) -> dict[str, Tensor]:
        """Task → (N, outputs) logits of the items labelled in this batch; one encoder pass."""
        mask = batch.attention_mask
        if batch.states is None:
            states, pooled = self.encoder(batch.input_ids, mask)
        else:
            states, pooled = self.encoder.upper(batch.states_depth, batch.states, mask)
        flat = states.flatten(0, 1)
        logits = {}
        for task, labelled in batch.labelled.items():
            head = self.head(task)
            source = pooled if head.level == "sentence" else flat
            logits[task] = head(source.index_select(0, labelled.positions))
        return logits
