"""What is frozen gets no gradient and no dropout; what thaws, thaws from the top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_core.config import EncoderConfig, FreezeConfig, TaskConfig
from mtl_core.encoder import SentenceEncoder, layers
from mtl_core.errors import EncoderError
from mtl_core.freezing import apply_freezing, frozen_layers, without_unused
from mtl_core.heads import build_head
from mtl_core.model import Batch, Labelled, MultiTaskModel
from mtl_core.weighting import FixedWeighting

ARCHITECTURES = ("bert", "distilbert", "roberta", "deberta-v2", "mpnet")
NUM_LAYERS = 3


def model_of(folder: Path) -> MultiTaskModel:
    encoder = SentenceEncoder.load(EncoderConfig(model=str(folder)))
    heads = {
        "intent": build_head(32, ("a", "b"), TaskConfig(kind="classification")),
        "ner": build_head(32, ("loc",), TaskConfig(kind="token_classification")),
        "carried": build_head(32, ("x", "y"), TaskConfig(kind="classification")),
    }
    return MultiTaskModel(encoder, heads, FixedWeighting({"intent": 1.0, "ner": 1.0}))


def backward(model: MultiTaskModel) -> None:
    """A real backward pass."""
    labelled = {
        "intent": Labelled(torch.tensor([0, 1]), torch.tensor([0, 1])),
        "ner": Labelled(torch.tensor([1, 2, 6]), torch.tensor([0, 1, 2])),
    }
    ids = torch.tensor([[2, 9, 11, 3], [2, 8, 3, 1]])
    model.zero_grad()
    losses = model(Batch(ids, torch.ones_like(ids), labelled))
    total = sum(losses.values())
    if total.requires_grad:
        total.backward()


def learns(model: MultiTaskModel) -> dict[str, bool]:
    """Part → whether it gets a gradient."""
    backward(model)
    stack = layers(model.encoder.transformer)
    parts: dict[str, list[torch.nn.Parameter]] = {"embeddings": []}
    inside = {id(p): f"layer {i}" for i, layer in enumerate(stack) for p in layer.parameters()}
    for name, parameter in model.encoder.transformer.named_parameters():
        part = inside.get(id(parameter), "embeddings")
        part = "pooler" if name.startswith("pooler.") else part
        parts.setdefault(part, []).append(parameter)
    for task, head in model.head_items:
        parts[task] = list(head.parameters())
    found = {}
    for part, parameters in parts.items():
        got = [bool(p.grad is not None and p.grad.any()) for p in parameters]
        found[part] = any(got)
        assert found[part] == any(p.requires_grad for p in parameters) or part == "pooler"
    return found


def expected(frozen: int, embeddings: bool = False, heads: tuple[str, ...] = ()) -> dict[str, bool]:
    parts = {"embeddings": not embeddings and frozen == 0}
    parts |= {f"layer {i}": i >= frozen for i in range(NUM_LAYERS)}
    return parts | {task: task not in heads for task in ("intent", "ner")} | {"carried": False}


CASES: list[Any] = [
    (FreezeConfig(), expected(0)),
    (FreezeConfig(embeddings=True), expected(0, embeddings=True)),
    (FreezeConfig(layers=1), expected(1)),
    (FreezeConfig(layers=2, heads=("intent",)), expected(2, heads=("intent",))),
    (FreezeConfig(layers=99), expected(3)),
    (FreezeConfig(encoder=True), expected(3)),
    (FreezeConfig(encoder=True, heads=("ner",)), expected(3, heads=("ner",))),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("freeze", "parts"), CASES)
def test_frozen_parts_get_no_gradient_and_all_others_do(
    tiny_encoders: dict[str, Path], name: str, freeze: FreezeConfig, parts: dict[str, bool]
) -> None:
    model = model_of(tiny_encoders[name])
    apply_freezing(model, freeze, 0)
    found = learns(model)
    assert not found.pop("pooler", False), "poolers feed no head"
    assert found == parts


@pytest.mark.parametrize(("freeze", "parts"), CASES)
def test_a_norm_above_all_layers_learns_if_the_top_one_does(
    unusual_encoders: dict[str, Path], freeze: FreezeConfig, parts: dict[str, bool]
) -> None:
    model = model_of(unusual_encoders["modernbert"])
    apply_freezing(model, freeze, 0)
    norm = model.encoder.transformer.final_norm
    assert {p.requires_grad for p in norm.parameters()} == {parts["layer 2"]}
    assert norm.training == parts["layer 2"]


@pytest.mark.parametrize("freeze", [{"embeddings": True}, {"layers": 1}, {"unfreeze_every": 1}])
def test_freezing_by_depth_needs_layers_of_their_own(
    unusual_encoders: dict[str, Path], freeze: dict[str, Any]
) -> None:
    with pytest.raises(EncoderError, match="AlbertModel has no list of 3 layers, which freezing"):
        apply_freezing(model_of(unusual_encoders["albert"]), FreezeConfig(**freeze), 0)


@pytest.mark.parametrize(("freeze", "parts"), CASES)
def test_frozen_parts_stay_in_eval_mode_and_others_train(
    tiny_encoders: dict[str, Path], freeze: FreezeConfig, parts: dict[str, bool]
) -> None:
    model = model_of(tiny_encoders["bert"])
    model.eval()
    apply_freezing(model, freeze, 0)
    transformer = model.encoder.transformer
    modes = {f"layer {i}": layer for i, layer in enumerate(layers(transformer))}
    modes |= {"embeddings": transformer.embeddings, **dict(model.heads.items())}
    for part, module in modes.items():
        assert {m.training for m in module.modules()} == {parts[part]}, part


@pytest.mark.parametrize("name", [*ARCHITECTURES, "albert", "modernbert", "gemma3", "longformer"])
def test_what_no_state_depends_on_is_what_gets_no_gradient(
    tiny_encoders: dict[str, Path], unusual_encoders: dict[str, Path], name: str
) -> None:
    model = model_of((tiny_encoders | unusual_encoders)[name])
    apply_freezing(model, FreezeConfig(layers=0 if name == "albert" else 1), 0)
    encoder = model.encoder
    before = {n for n, p in encoder.named_parameters() if p.requires_grad}
    with without_unused(encoder):
        used = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert before == {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in before - used} == (
        {"query_global", "key_global", "value_global"} if name == "longformer" else set()
    )
    backward(model)
    assert used == {n for n, p in encoder.named_parameters() if p.grad is not None}


def test_a_frozen_encoder_gives_the_same_states_while_heads_train(
    tiny_encoders: dict[str, Path],
) -> None:
    model = model_of(tiny_encoders["bert"])
    apply_freezing(model, FreezeConfig(encoder=True), 0)
    ids = torch.tensor([[2, 9, 11, 3]])
    mask = torch.ones_like(ids)
    assert torch.equal(model.encoder(ids, mask)[0], model.encoder(ids, mask)[0])
    apply_freezing(model, FreezeConfig(), 0)
    assert not torch.equal(model.encoder(ids, mask)[0], model.encoder(ids, mask)[0])


def test_unfreezing_goes_from_the_top_down_to_what_stays_frozen(
    tiny_encoders: dict[str, Path],
) -> None:
    model = model_of(tiny_encoders["bert"])
    freeze = FreezeConfig(unfreeze_every=2, layers=1)
    frozen = []
    for epoch in range(8):
        apply_freezing(model, freeze, epoch)
        found = learns(model)
        found.pop("pooler")
        frozen.append(3 - sum(found[f"layer {i}"] for i in range(3)))
        assert found == expected(frozen[-1])
    assert frozen == [3, 3, 2, 2, 1, 1, 1, 1]


def test_embeddings_thaw_last_unless_they_are_kept_frozen(tiny_encoders: dict[str, Path]) -> None:
    model = model_of(tiny_encoders["bert"])
    for embeddings in (False, True):
        freeze = FreezeConfig(unfreeze_every=1, embeddings=embeddings)
        thawed = []
        for epoch in range(5):
            apply_freezing(model, freeze, epoch)
            thawed.append(learns(model)["embeddings"])
        assert thawed == ([False] * 5 if embeddings else [False, False, False, True, True])


def test_it_says_whether_anything_changed(tiny_encoders: dict[str, Path]) -> None:
    model = model_of(tiny_encoders["bert"])
    freeze = FreezeConfig(unfreeze_every=2)
    changed = [apply_freezing(model, freeze, epoch) for epoch in range(8)]
    assert changed == [True, False, True, False, True, False, True, False]


@pytest.mark.parametrize(
    ("freeze", "epochs", "depth"),
    [
        (FreezeConfig(), 5, 0),
        (FreezeConfig(embeddings=True), 5, 0),
        (FreezeConfig(encoder=True), 5, 3),
        (FreezeConfig(layers=2), 5, 2),
        (FreezeConfig(unfreeze_every=1), 2, 2),
        (FreezeConfig(unfreeze_every=1), 9, 0),
        (FreezeConfig(unfreeze_every=1, layers=2), 9, 2),
    ],
)
def test_fewest_layers_are_frozen_in_the_last_epoch(
    freeze: FreezeConfig, epochs: int, depth: int
) -> None:
    assert frozen_layers(freeze, 3, epochs - 1) == depth
    assert depth == min(frozen_layers(freeze, 3, epoch) for epoch in range(epochs))
