"""Dropout on CPUs at the price of a multiplication.

PyTorch draws a CPU's dropout masks one element at a time from a Mersenne Twister, which costs more
than a tenth of a training step of a small encoder. `QuickDropout` draws four elements at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LEVELS = 2**16
"""An element is kept or dropped by 16 random bits: rates are met to within 1 in 65,536."""


class QuickDropout(TorchFunctionMode):
    """While active, dropout of CPU tensors takes its bits from a generator of its own.

    Whatever the architecture, it goes through two functions: `dropout`, and attention, which on
    CPUs has no fused kernel with dropout and is spelt out here in the precision of its inputs.
    """

    def __init__(self, seeds: np.random.SeedSequence) -> None:
        super().__init__()
        self.random = np.random.Generator(np.random.SFC64(seeds))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and _is_plain(kwargs):
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        dropped = min(round(p * LEVELS), LEVELS - 1)
        if not training or dropped == 0:
            return x
        words = self.random.integers(0, 2**64, size=-(-x.numel() // 4), dtype=np.uint64)
        bits = torch.from_numpy(words.view(np.int16)[: x.numel()]).view(x.shape)
        keep = (bits >= dropped - LEVELS // 2).to(x.dtype)
        return x * keep.mul_(LEVELS / (LEVELS - dropped))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        """Scaled dot-product attention as PyTorch's documentation defines it."""
        scores = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            else:
                scores = scores + attn_mask
        return self._dropout(scores.softmax(dim=-1), dropout_p) @ value


def _is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether attention drops something and asks for nothing beyond a mask and a scale."""
    special = settings.get("is_causal") or settings.get("enable_gqa")
    return bool(settings.get("dropout_p")) and not special
