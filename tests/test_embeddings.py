"""A table of which some rows learn is the whole table in all that can be seen of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mtl_core import build
from mtl_core.build import build_train_state
from mtl_core.config import EncoderConfig
from mtl_core.embeddings import RowsEmbedding, fixed_table, learn_rows, learned_rows
from mtl_core.encoder import SentenceEncoder
from mtl_core.loop import fit
from mtl_core.state import TrainState
from tests.small_runs import data, experiment, weights

ARCHITECTURES = ("bert", "distilbert", "roberta", "deberta-v2", "mpnet")
USED = np.array([9, 4, 9, 11, 7, 4], dtype=np.int32)
IDS = torch.tensor([[4, 9, 30, 7], [11, 12, 4, 4]])


def tables(padding: int | None = 7, seed: int = 0) -> tuple[nn.Embedding, RowsEmbedding]:
    torch.manual_seed(seed)
    table = nn.Embedding(40, 6, padding_idx=padding)
    return table, RowsEmbedding(table, USED)


def learn_apart(folder: Path | str, whole: bool, **changes: Any) -> TrainState:
    """A run of two epochs, if no more is said, on the whole table or on the rows that occur."""
    config = experiment(folder, **{"training": {"epochs": 2}, **changes})
    encoded = data(config)
    state = build_train_state(config, encoded)
    if whole:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "learn_rows", lambda *_: None)
            state = build_train_state(config, encoded)
    list(fit(state, encoded, config))
    return state


@pytest.mark.parametrize(("padding", "learning"), [(7, [4, 9, 11]), (None, [4, 7, 9, 11])])
def test_rows_that_occur_and_rows_that_do_not_are_looked_up_alike(
    padding: int | None, learning: list[int]
) -> None:
    table, part = tables(padding)
    assert torch.equal(part(IDS), table(IDS))
    assert torch.equal(part.weight, table.weight[learning])  # the padding row never learns


def test_only_rows_that_learn_get_a_gradient_and_it_is_the_whole_tables() -> None:
    table, part = tables()
    slope = torch.randn(2, 4, 6)
    for module in (table, part):
        (module(IDS) * slope).sum().backward()
    assert table.weight.grad is not None
    assert part.weight.grad is not None
    assert torch.equal(part.weight.grad, table.weight.grad[[4, 9, 11]])


def test_its_state_is_that_of_an_ordinary_embedding() -> None:
    table, part = tables()
    with torch.no_grad():
        part.weight += 1
    state = part.state_dict()
    assert state.keys() == table.state_dict().keys()
    moved = (state["weight"] != table.weight).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [4, 9, 11]
    other = tables(seed=1)[1]
    other.load_state_dict(state)
    assert torch.equal(other(IDS), part(IDS))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_rows_gives_what_training_the_whole_table_gives_bit_for_bit(
    tiny_encoders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """Without decay, which alone moves rows that no text uses."""
    saved: list[dict[str, Tensor]] = []
    for whole in (True, False):
        state = learn_apart(tiny_encoders[name], whole, optim={"weight_decay": 0.0})
        table = state.model.encoder.transformer.get_input_embeddings()
        assert isinstance(table, RowsEmbedding) != whole
        state.model.encoder.save(tmp_path / str(whole))
        saved.append(load_file(tmp_path / str(whole) / "model.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    for key in saved[0]:
        assert torch.equal(saved[0][key], saved[1][key]), key
    before = SentenceEncoder.load(EncoderConfig(model=str(tiny_encoders[name])))
    start = before.transformer.get_input_embeddings().weight
    table = state.model.encoder.transformer.get_input_embeddings()
    moved = (table.whole() != start).any(dim=1).nonzero().flatten()
    assert len(moved)
    assert set(moved.tolist()) <= set(table.rows.tolist())


def test_words_outside_of_training_keep_their_pretrained_vectors_bit_for_bit(
    tiny_encoders: dict[str, Path],
) -> None:
    """Decay and moments do not reach them."""
    state = learn_apart(tiny_encoders["bert"], False, optim={"weight_decay": 0.5})
    table = state.model.encoder.transformer.get_input_embeddings()
    start = SentenceEncoder.load(EncoderConfig(model=str(tiny_encoders["bert"])))
    pretrained = start.transformer.get_input_embeddings().weight
    changed = (table.whole() != pretrained).any(dim=1).nonzero().flatten()
    assert torch.equal(changed, table.rows)
    assert 0 < len(changed) < len(pretrained)


def test_a_checkpoint_stores_the_rows_that_learn_only(
    tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    state = learn_apart(tiny_encoders["bert"], False, training={"epochs": 1})
    state.save(tmp_path)
    table = state.model.encoder.transformer.get_input_embeddings()
    (name,) = (n for n in weights(state.model) if n.endswith("word_embeddings.weight"))
    for file, key in (("model", "now"), ("optimizer", "exp_avg"), ("optimizer", "exp_avg_sq")):
        stored = load_file(tmp_path / f"{file}.safetensors")
        assert stored[f"{key}.{name}"].shape == (len(table.rows), table.embedding_dim)


@pytest.mark.parametrize(("name", "compact"), [("modernbert", True), ("gemma3", False)])
def test_a_table_looks_up_the_same_whether_rows_or_all_of_it_learn(
    unusual_encoders: dict[str, Path], name: str, compact: bool
) -> None:
    """Gemma's scales what it looks up, which the table of rows would not."""
    encoder = SentenceEncoder.load(EncoderConfig(model=str(unusual_encoders[name]), dropout=0.0))
    before = encoder(IDS, torch.ones_like(IDS))[0]
    learn_rows(encoder.transformer, USED)
    assert torch.equal(encoder(IDS, torch.ones_like(IDS))[0], before)
    assert (learned_rows(encoder.transformer) is not None) == compact


@pytest.mark.parametrize(
    ("freeze", "compact"),
    [
        ({}, True),
        ({"unfreeze_every": 1}, True),
        ({"embeddings": True}, False),
        ({"layers": 1}, False),
        ({"encoder": True}, False),
    ],
)
def test_embeddings_that_never_learn_stay_the_ordinary_table(
    tiny_encoders: dict[str, Path], freeze: dict[str, Any], compact: bool
) -> None:
    config = experiment(tiny_encoders["bert"], freeze=freeze)
    encoded = data(config)
    model = build.build_model(config, encoded.labels)
    build.fit_to_data(model, config, encoded.splits["train"])
    table = model.encoder.transformer.get_input_embeddings()
    assert isinstance(table, RowsEmbedding) == compact


def test_the_table_is_fingerprinted_without_a_copy() -> None:
    _, part = tables()
    transformer = SimpleNamespace(get_input_embeddings=lambda: part)
    assert fixed_table(transformer)["fixed_table"].data_ptr() == part.fixed.data_ptr()
