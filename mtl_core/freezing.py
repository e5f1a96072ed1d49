"""What learns: freezing of encoder parts and heads, and gradual unfreezing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtl_core.config import FreezeConfig
from mtl_core.encoder import SentenceEncoder, layer_groups
from mtl_core.model import MultiTaskModel


def frozen_layers(freeze: FreezeConfig, num_layers: int, epoch: int) -> int:
    """How many of the lowest layers do not learn in this epoch (0-based).

    Gradual unfreezing starts with all of them and frees one more from the top each
    `unfreeze_every` epochs (Howard and Ruder, ACL 2018).
    """
    if freeze.encoder:
        return num_layers
    if freeze.unfreeze_every is None:
        return min(freeze.layers, num_layers)
    freed = epoch // freeze.unfreeze_every
    return max(min(freeze.layers, num_layers), num_layers - freed)


def freezes_embeddings(freeze: FreezeConfig, num_layers: int, epoch: int) -> bool:
    """Embeddings never learn below a frozen layer."""
    return freeze.embeddings or frozen_layers(freeze, num_layers, epoch) > 0


def apply_freezing(model: MultiTaskModel, freeze: FreezeConfig, epoch: int) -> bool:
    """Set `requires_grad` and eval mode for an epoch; returns whether anything changed.

    Frozen modules stay in eval mode, so their dropout is off and what they compute for a text
    is the same in every epoch. Poolers that come with some checkpoints feed no head and never
    learn. Heads without a task in this run (carried over by `init_from`) are frozen too.
    """
    encoder = model.encoder
    transformer = encoder.transformer
    before = [p.requires_grad for p in model.parameters()]
    model.train()
    if freeze.encoder:
        encoder.requires_grad_(False)
        encoder.eval()
    else:
        frozen = frozen_layers(freeze, encoder.num_layers, epoch)
        learns = not freezes_embeddings(freeze, encoder.num_layers, epoch)
        encoder.requires_grad_(learns)
        encoder.train(learns)
        for depth, block in enumerate(() if learns else layer_groups(transformer)):
            block.requires_grad_(depth >= frozen)
            block.train(depth >= frozen)
        for name, parameter in transformer.named_parameters():
            if name.startswith("pooler."):
                parameter.requires_grad_(False)
    for task, head in model.head_items:
        learns = task in model.weighting.loss_weights and task not in freeze.heads
        head.requires_grad_(learns)
        head.train(learns)
    return before != [p.requires_grad for p in model.parameters()]


@contextmanager
def without_unused(encoder: SentenceEncoder) -> Iterator[None]:
    """Within the block parameters that no token state depends on count as frozen.

    They never get a gradient that ranks could wait for: Longformer's for global attention.
    """
    learning = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    unused = []
    if learning:
        ids = torch.full((1, 1), encoder.pad_id, device=learning[0].device)
        output = encoder.transformer(input_ids=ids, attention_mask=torch.ones_like(ids))
        total = output.last_hidden_state.sum()
        found = torch.autograd.grad(total, learning, allow_unused=True)
        unused = [p for p, gradient in zip(learning, found, strict=True) if gradient is None]
    for parameter in unused:
        parameter.requires_grad_(False)
    yield
    for parameter in unused:
        parameter.requires_grad_(True)
