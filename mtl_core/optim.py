"""How fast: AdamW with a rate per depth, and the schedule of rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtl_core.config import FreezeConfig, OptimConfig
from mtl_core.encoder import layer_groups
from mtl_core.freezing import apply_freezing
from mtl_core.model import MultiTaskModel


def build_optimizer(
    model: MultiTaskModel, config: OptimConfig, freeze: FreezeConfig, epochs: int
) -> torch.optim.AdamW | None:
    """Fused AdamW over everything that learns at some time of the run; None if nothing does.

    A group's peak rate stands in its `peak_lr`. Encoder depth d (0 the embeddings, n the top
    layer) learns at learning_rate · layer_decay^(n-d) (Sun et al., "How to Fine-Tune BERT for Text
    Classification?", 2019). Biases and normalisation weights are not decayed.
    """
    apply_freezing(model, freeze, epochs - 1)  # what thaws learns from then on to the end
    even = freeze.encoder or config.layer_decay == 1
    stack = () if even else layer_groups(model.encoder.transformer)
    depths = {id(p): depth for depth, block in enumerate(stack, 1) for p in block.parameters()}
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = config.head_learning_rate or config.learning_rate
        if name.startswith("encoder."):
            above = model.encoder.num_layers - depths.get(id(parameter), 0)
            rate = config.learning_rate * config.layer_decay**above
        groups.setdefault((rate, parameter.ndim > 1), []).append(parameter)
    if not groups:
        return None
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak_lr": rate,
                "lr": rate,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (rate, decays), parameters in groups.items()
        ],
        betas=config.betas,
        fused=True,
    )


def rate_factor(config: OptimConfig, progress: float) -> float:
    """Share of the peak rate at `progress` (0 to 1): warm-up, then the schedule."""
    if progress < config.warmup:
        return progress / config.warmup
    rest = (progress - config.warmup) / (1 - config.warmup)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    return 1 - rest


def set_rates(optimizer: torch.optim.Optimizer, config: OptimConfig, progress: float) -> float:
    """Set every group's rate for one step; returns the factor."""
    factor = rate_factor(config, progress)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return factor


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all numbers together, () fp32.

    On CPUs by products of each with itself, which take a third of the time of PyTorch's norm.
    """
    if not gradients or gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    squares = [torch.dot(flat, flat) for flat in (gradient.flatten() for gradient in gradients)]
    return torch.stack(squares).sum().sqrt()
