"""Rates by depth, who decays, and the values of the schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from mtl_core.config import EncoderConfig, FreezeConfig, OptimConfig, TaskConfig
from mtl_core.encoder import SentenceEncoder, layers
from mtl_core.errors import EncoderError
from mtl_core.freezing import apply_freezing
from mtl_core.heads import build_head
from mtl_core.model import MultiTaskModel
from mtl_core.optim import build_optimizer, rate_factor, set_rates, total_norm
from mtl_core.weighting import FixedWeighting, UncertaintyWeighting, Weighting

ARCHITECTURES = ("bert", "distilbert", "roberta", "deberta-v2", "mpnet")


def model_of(folder: Path, weighting: type[Weighting] = FixedWeighting) -> MultiTaskModel:
    encoder = SentenceEncoder.load(EncoderConfig(model=str(folder)))
    heads = {
        task: build_head(32, ("a", "b"), TaskConfig(kind="classification"))
        for task in ("one", "two.b", "carried")
    }
    return MultiTaskModel(encoder, heads, weighting({"one": 1.0, "two.b": 1.0}))


def groups_of(
    model: MultiTaskModel, config: OptimConfig, freeze: FreezeConfig | None = None, epochs: int = 5
) -> dict[str, Any]:
    """Parameter name → its group in the optimiser."""
    optimizer = build_optimizer(model, config, freeze or FreezeConfig(), epochs)
    if optimizer is None:
        return {}
    names = {id(p): name for name, p in model.named_parameters()}
    placed = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    assert len(dict(placed)) == len(placed), "a parameter stands in two groups"
    return dict(placed)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_layer_learns_at_a_share_of_the_rate_above_it(
    tiny_encoders: dict[str, Path], name: str
) -> None:
    model = model_of(tiny_encoders[name])
    config = OptimConfig(learning_rate=1e-3, head_learning_rate=5e-3, layer_decay=0.5)
    groups = groups_of(model, config)
    transformer = model.encoder.transformer
    ids = {id(p): i for i, layer in enumerate(layers(transformer)) for p in layer.parameters()}
    depths = set()
    for parameter_name, parameter in model.encoder.named_parameters():
        if ".pooler." in f".{parameter_name}":
            assert f"encoder.{parameter_name}" not in groups
            continue
        depth = ids.get(id(parameter), -1)
        depths.add(depth)
        rate = groups[f"encoder.{parameter_name}"]["peak_lr"]
        assert rate == pytest.approx(1e-3 * 0.5 ** (2 - depth))
    assert depths == {-1, 0, 1, 2}
    assert groups["heads.one.output.weight"]["peak_lr"] == 5e-3


def test_a_norm_above_all_layers_learns_at_the_rate_of_the_top_one(
    unusual_encoders: dict[str, Path],
) -> None:
    model = model_of(unusual_encoders["modernbert"])
    groups = groups_of(model, OptimConfig(learning_rate=1e-3, layer_decay=0.5))
    rates = {name: group["peak_lr"] for name, group in groups.items()}
    assert rates["encoder.transformer.final_norm.weight"] == 1e-3
    assert rates["encoder.transformer.layers.2.mlp.Wo.weight"] == 1e-3
    assert rates["encoder.transformer.layers.1.mlp.Wo.weight"] == 5e-4
    assert rates["encoder.transformer.embeddings.norm.weight"] == 1.25e-4


def test_rates_by_depth_need_layers_of_their_own(unusual_encoders: dict[str, Path]) -> None:
    model = model_of(unusual_encoders["albert"])
    assert groups_of(model, OptimConfig(layer_decay=0.5), FreezeConfig(encoder=True))
    with pytest.raises(EncoderError, match=r"AlbertModel has no list of 3 layers, .* rates need"):
        groups_of(model, OptimConfig(layer_decay=0.5))


def test_heads_learn_at_the_encoders_rate_when_none_is_given(
    tiny_encoders: dict[str, Path],
) -> None:
    groups = groups_of(model_of(tiny_encoders["bert"]), OptimConfig(learning_rate=3e-4))
    assert groups["heads.one.output.weight"]["peak_lr"] == 3e-4


def test_only_matrices_decay(tiny_encoders: dict[str, Path]) -> None:
    model = model_of(tiny_encoders["bert"])
    parameters = dict(model.named_parameters())
    groups = groups_of(model, OptimConfig(weight_decay=0.1))
    for name, group in groups.items():
        is_matrix = name.endswith("weight") and "LayerNorm" not in name
        assert group["weight_decay"] == (0.1 if is_matrix else 0.0), name
        assert (parameters[name].ndim == 2) == is_matrix
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.1}


def test_every_parameter_has_the_moments_that_were_asked_for(
    tiny_encoders: dict[str, Path],
) -> None:
    groups = groups_of(model_of(tiny_encoders["bert"]), OptimConfig(betas=(0.8, 0.95)))
    assert {group["betas"] for group in groups.values()} == {(0.8, 0.95)}


@pytest.mark.parametrize(
    ("freeze", "epochs"),
    [
        (FreezeConfig(), 3),
        (FreezeConfig(encoder=True), 3),
        (FreezeConfig(embeddings=True), 3),
        (FreezeConfig(layers=2, heads=("two.b",)), 3),
        (FreezeConfig(unfreeze_every=1), 2),
        (FreezeConfig(unfreeze_every=1), 4),
        (FreezeConfig(unfreeze_every=2, layers=1), 9),
    ],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_optimiser_holds_exactly_what_learns_at_some_time(
    tiny_encoders: dict[str, Path], name: str, freeze: FreezeConfig, epochs: int
) -> None:
    model = model_of(tiny_encoders[name])
    ever = set()
    for epoch in range(epochs):
        apply_freezing(model, freeze, epoch)
        ever |= {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(groups_of(model, OptimConfig(), freeze, epochs)) == ever


def test_without_anything_to_learn_there_is_no_optimiser(tiny_encoders: dict[str, Path]) -> None:
    freeze = FreezeConfig(encoder=True, heads=("one", "two.b"))
    model = model_of(tiny_encoders["bert"])
    assert build_optimizer(model, OptimConfig(), freeze, 3) is None


def test_learned_task_weights_are_not_decayed(tiny_encoders: dict[str, Path]) -> None:
    model = model_of(tiny_encoders["bert"], UncertaintyWeighting)
    group = groups_of(model, OptimConfig(head_learning_rate=0.01))["weighting.log_variance"]
    assert group["weight_decay"] == 0
    assert group["peak_lr"] == 0.01


@pytest.mark.parametrize("warmup", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_are_those_of_transformers(kind: Any, warmup: float) -> None:
    make = {
        "linear": get_linear_schedule_with_warmup,
        "cosine": get_cosine_schedule_with_warmup,
    }[kind]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = make(optimizer, int(100 * warmup), 100)
    config = OptimConfig(schedule=kind, warmup=warmup)
    for step in range(100):
        assert rate_factor(config, step / 100) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_constant_schedule_only_warms_up() -> None:
    config = OptimConfig(schedule="constant", warmup=0.2)
    factors = [rate_factor(config, p) for p in (0.0, 0.1, 0.2, 0.7, 1.0)]
    assert factors == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_ends_at_zero(schedule: Any) -> None:
    assert rate_factor(OptimConfig(schedule=schedule), 1.0) == pytest.approx(0)


def test_rates_of_all_groups_move_together_and_peaks_stay(tiny_encoders: dict[str, Path]) -> None:
    config = OptimConfig(learning_rate=1e-3, layer_decay=0.5, warmup=0.5)
    model = model_of(tiny_encoders["bert"])
    optimizer = build_optimizer(model, config, FreezeConfig(), 3)
    assert optimizer is not None
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    for progress in (0.25, 0.1, 0.5):
        factor = set_rates(optimizer, config, progress)
        assert factor == pytest.approx(progress / 0.5)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([peak * factor for peak in peaks])


@pytest.mark.parametrize("spoilt", [None, float("inf"), float("nan")])
def test_the_norm_of_all_gradients_is_pytorchs(spoilt: float | None) -> None:
    gradients = [torch.randn(shape) for shape in ((300, 40), (7,), ())]
    if spoilt is not None:
        gradients[0][5, 5] = spoilt
    expected = torch.nn.utils.get_total_norm(gradients)
    torch.testing.assert_close(total_norm(gradients), expected, equal_nan=True)
    assert total_norm([]) == 0
