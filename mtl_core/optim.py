"""How fast: AdamW with a rate per depth, and the schedule of rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtl_core.config import FreezeConfig, OptimConfig
from mtl_core.encoder import layers
from mtl_core.freezing import frozen_layers
from mtl_core.model import MultiTaskModel


def build_optimizer(
    model: MultiTaskModel, config: OptimConfig, freeze: FreezeConfig, epochs: int
) -> torch.optim.AdamW | None:
    """Fused AdamW over everything that learns at some time of the run; None if nothing does.

    A group's peak rate stands in its `peak_lr`. Encoder depth d (0 the embeddings, n the top
    layer) learns at learning_rate · layer_decay^(n-d) (Sun et al., "How to Fine-Tune BERT for Text
    Classification?", 2019). Biases and normalisation weights are not decayed.
    """
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = _peak_rate(model, name, config, freeze, epochs)
        if rate is not None:
            decays = parameter.ndim > 1
            groups.setdefault((rate, decays), []).append(parameter)
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


def _peak_rate(
    model: MultiTaskModel, name: str, config: OptimConfig, freeze: FreezeConfig, epochs: int
) -> float | None:
    """The peak rate of one parameter, None when it never learns."""
    assert model.weighting is not None
    part, _, rest = name.partition(".")
    if part == "heads":
        task = rest.rsplit(".", 2)[0]  # what follows is a layer of the head and its tensor
        learns = task in model.weighting.loss_weights and task not in freeze.heads
        return (config.head_learning_rate or config.learning_rate) if learns else None
    if part == "weighting":
        return config.head_learning_rate or config.learning_rate
    if freeze.encoder or ".pooler." in name:
        return None
    depth = _depth(model, name)
    last_epoch_frozen = frozen_layers(freeze, model.encoder.num_layers, epochs - 1)
    if depth == 0 and (freeze.embeddings or last_epoch_frozen > 0):
        return None
    if 0 < depth <= last_epoch_frozen:
        return None
    return config.learning_rate * config.layer_decay ** (model.encoder.num_layers - depth)


def _depth(model: MultiTaskModel, name: str) -> int:
    """1 for the lowest layer up to n for the top one; 0 for all that is in no layer."""
    stack = layers(model.encoder.transformer)
    for prefix, module in model.named_modules():
        if module is stack and name.startswith(prefix + "."):
            return 1 + int(name.removeprefix(prefix + ".").split(".")[0])
    return 0


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
