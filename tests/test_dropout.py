"""Quick dropout is dropout: rates, scale, gradients, and attention as PyTorch computes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ModernBertConfig, ModernBertModel

from mtl_core.config import EncoderConfig
from mtl_core.dropout import SHORT, QuickDropout
from mtl_core.encoder import SentenceEncoder

ARCHITECTURES = ("bert", "distilbert", "roberta", "deberta-v2", "mpnet")


def quick(*seed: int) -> QuickDropout:
    return QuickDropout(np.random.SeedSequence(list(seed) or [0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_the_asked_share_is_dropped_and_the_rest_scaled_up(p: float, dtype: torch.dtype) -> None:
    x = torch.full((1000, 333), 2.0, dtype=dtype)
    with quick():
        y = nn.Dropout(p)(x)
    assert y.dtype == dtype
    dropped = (y == 0).float().mean().item()
    assert dropped == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-9)
    kept = y[y != 0].float()
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - p)), rtol=0.01, atol=0)


def test_neighbours_are_dropped_independently() -> None:
    with quick():
        kept = F.dropout(torch.ones(400_000)) > 0  # half, as PyTorch's
    for distance in range(1, 9):
        together = (kept[distance:] == kept[:-distance]).float().mean().item()
        assert together == pytest.approx(0.5, abs=0.005)


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(50, 7, requires_grad=True)
    with quick():
        y = F.dropout(x, 0.3)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x * slope)
    assert 0 < (slope == 0).float().mean() < 1


def test_the_mask_is_a_function_of_the_seed() -> None:
    x = torch.ones(64, 33)

    def twice(*seed: int) -> list[torch.Tensor]:
        with quick(*seed):
            return [F.dropout(x, 0.5), F.dropout(x, 0.5)]

    first, again, other = twice(1, 2), twice(1, 2), twice(1, 3)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_nothing_is_dropped_outside_of_training_or_of_the_context() -> None:
    x = torch.randn(9, 9)
    with quick():
        assert torch.equal(nn.Dropout(0.5).eval()(x), x)
    torch.manual_seed(3)
    expected = F.dropout(x, 0.5)
    with quick():
        pass
    torch.manual_seed(3)
    assert torch.equal(F.dropout(x, 0.5), expected)


@pytest.mark.parametrize("length", [5, SHORT, SHORT + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_dropout_attention_and_its_gradient_are_pytorchs(
    length: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    mask = torch.rand(2, 1, length, length) < 0.7
    mask[..., 0] = True

    def attend() -> list[torch.Tensor]:
        y = F.scaled_dot_product_attention(*given, attn_mask=mask)
        return [y, *torch.autograd.grad(y.float().square().sum(), given)]

    expected = attend()
    with quick():
        found = attend()
    fused = "ScaledDotProduct" in found[0].grad_fn.name()
    assert fused == (length > SHORT)
    close = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("scale", [0.4, None])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_attention_is_pytorchs_but_for_what_is_dropped(kind: str, scale: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5) < 0.7
    mask[..., 0] = True
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    chosen = {"none": None, "boolean": mask, "additive": additive}[kind]

    def attend(**dropout: float) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=chosen, scale=scale, **dropout)

    whole = attend()
    with quick():
        plain, same = attend(), attend(dropout_p=1e-9)
        many = torch.stack([attend(dropout_p=0.2) for _ in range(3000)])
    torch.testing.assert_close(plain, whole)
    torch.testing.assert_close(same, whole)
    assert not torch.equal(many[0], many[1])
    torch.testing.assert_close(many.mean(0), whole, rtol=0, atol=0.1)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_query_that_sees_no_key_spoils_nothing(kind: str, p: float) -> None:
    given = [torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3)]
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[..., 2, :] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    with quick():
        y = F.scaled_dot_product_attention(*given, attn_mask=mask, dropout_p=p)
    assert y.isfinite().all()
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(y.sum(), given))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_architecture_draws_from_pytorchs_generator_any_more(
    tiny_encoders: dict[str, Path], name: str
) -> None:
    encoder = SentenceEncoder.load(EncoderConfig(model=str(tiny_encoders[name]))).train()
    ids = torch.tensor([[2, 9, 11, 3], [2, 8, 3, 7]])
    before = torch.get_rng_state()
    with quick():
        first = encoder(ids, torch.ones_like(ids))[0]
        second = encoder(ids, torch.ones_like(ids))[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_short_text_beside_a_long_one_learns_under_local_attention(p: float) -> None:
    config = ModernBertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=8,
        attention_dropout=p,
        pad_token_id=0,
    )
    model = ModernBertModel(config).train()
    ids = torch.arange(1, 81).view(2, 40) % 50
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    with quick():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    loss = states[mask.bool()].square().sum()
    slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert loss.isfinite()
    assert all(slope.isfinite().all() for slope in slopes if slope is not None)
