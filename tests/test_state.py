"""A checkpoint holds all that training needs, and nothing that is unpickled."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mtl_core.build import build_train_state
from mtl_core.data.examples import Corpus
from mtl_core.data.prepare import encode
from mtl_core.errors import DataError
from mtl_core.loop import fit
from mtl_core.state import TrainState
from tests.small_runs import LABELS, changed, data, examples, experiment, weights


@pytest.fixture(scope="module")
def bert(tiny_encoders: dict[str, Path]) -> Path:
    return tiny_encoders["bert"]


def half_way(bert: Path, steps: int = 13, **changes: Any) -> TrainState:
    """A state in the middle of the second epoch, whose best weights are the first epoch's."""
    config = experiment(
        bert, training={"checkpoint_every": 1}, optim={"learning_rate": 1e-3}, **changes
    )
    state = build_train_state(config, encoded := data(config))
    if steps:
        next(
            event
            for event in fit(state, encoded, config)
            if event.kind == "checkpoint" and event.row["step"] == steps
        )
    return state


def moments(state: TrainState) -> dict[str, Any]:
    assert state.optimizer is not None
    return {
        f"{key}.{name}": value
        for name, parameter in state.trainable_parameters().items()
        for key, value in state.optimizer.state[parameter].items()
    }


def names(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_a_checkpoint_gives_back_weights_moments_and_progress(bert: Path, tmp_path: Path) -> None:
    state = half_way(bert)
    state.save(tmp_path)
    other = half_way(bert, steps=0)
    assert changed(weights(state.model), weights(other.model))
    other.load(tmp_path)
    assert not changed(weights(state.model), weights(other.model))
    assert moments(state)
    assert not changed(moments(state), moments(other))
    assert state.best
    assert not changed(state.best, other.best)
    assert changed(state.best, dict(state.trainable_parameters()))
    for name in ("epoch", "step", "part", "step_in_part", "best_score", "best_epoch"):
        assert getattr(other, name) == getattr(state, name)
    assert (other.epoch, other.step, other.part, other.step_in_part) == (1, 13, 0, 3)


def test_a_checkpoint_before_the_first_step_gives_back_the_beginning(
    bert: Path, tmp_path: Path
) -> None:
    state = half_way(bert, steps=0)
    state.save(tmp_path)
    before = weights(state.model)
    state.load(tmp_path)
    assert not changed(before, weights(state.model))
    assert (state.epoch, state.step, state.best, state.best_score) == (0, 0, {}, float("-inf"))


def test_loading_does_not_tie_the_best_weights_to_the_moving_ones(
    bert: Path, tmp_path: Path
) -> None:
    state = half_way(bert, steps=0)
    state.epoch = 1
    state.update_best(0.5)
    state.save(tmp_path)
    best = weights(state.model)
    state.load(tmp_path)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.zero_()
    state.restore_best()
    assert not {n for n in changed(best, weights(state.model)) if ".pooler." not in n}


def test_a_checkpoint_of_other_training_texts_is_refused(bert: Path, tmp_path: Path) -> None:
    half_way(bert).save(tmp_path)
    config = experiment(bert)
    other = build_train_state(config, data(config, train=2))
    before = weights(other.model)
    with pytest.raises(DataError, match="training texts changed"):
        other.load(tmp_path)
    assert not changed(before, weights(other.model))


def test_a_checkpoint_whose_best_score_is_of_other_validation_texts_is_refused(
    bert: Path, tmp_path: Path
) -> None:
    half_way(bert).save(tmp_path)
    config = experiment(bert)
    with pytest.raises(DataError, match=r"validation texts changed.*put back"):
        build_train_state(config, data(config, validation=29)).load(tmp_path)


def test_the_order_of_the_texts_counts_too_and_where_the_table_is_frozen(
    bert: Path, tmp_path: Path
) -> None:
    half_way(bert, freeze={"encoder": True}).save(tmp_path)
    config = experiment(bert, freeze={"encoder": True})
    turned = encode(Corpus({"train": examples(0, 40)[::-1]}, {}, {}), config, LABELS)
    with pytest.raises(DataError, match=r"training texts changed.*put back"):
        build_train_state(config, turned).load(tmp_path)
    build_train_state(config, data(config)).load(tmp_path)


def test_a_checkpoint_of_another_pooling_is_refused(bert: Path, tmp_path: Path) -> None:
    half_way(bert, encoder={"pooling": "cls"}).save(tmp_path)
    config = experiment(bert, encoder={"pooling": "max"})
    with pytest.raises(DataError, match=r"pooling by cls \(encoder\.pooling\) changed"):
        build_train_state(config, data(config)).load(tmp_path)


@pytest.mark.parametrize("theirs", ["now.heads.mood.norm.bias", "kept.weighting.seen", None])
def test_a_checkpoint_of_parameters_of_other_names_is_refused(
    theirs: str | None, bert: Path, tmp_path: Path
) -> None:
    half_way(bert).save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    moved = tensors.pop("now.heads.mood.output.bias")
    save_file(tensors if theirs is None else tensors | {theirs: moved}, path)
    progress = json.loads((tmp_path / "progress.json").read_text())
    (tmp_path / "progress.json").write_text(
        json.dumps(progress | {"made_for": {"the training texts": "others"}})
    )
    other = half_way(bert, steps=0)
    with pytest.raises(DataError, match=r"another version of this software: start a run of anoth"):
        other.load(tmp_path)


def test_a_checkpoint_of_other_labels_is_refused(bert: Path, tmp_path: Path) -> None:
    half_way(bert).save(tmp_path)
    config = experiment(bert)
    renamed = LABELS | {"mood": ("good", "late", "bad")}
    corpus = Corpus({"train": examples(0, 40)}, {}, {})
    with pytest.raises(DataError, match=r"labels of task 'mood' changed.*put back"):
        build_train_state(config, encode(corpus, config, renamed)).load(tmp_path)


@pytest.mark.parametrize(
    ("freeze", "changed", "fits"),
    [
        ({"encoder": True}, "encoder.transformer.encoder.layer.2.output.dense.bias", False),
        ({"layers": 1}, "encoder.transformer.embeddings.word_embeddings.weight", False),
        ({"layers": 1}, "encoder.transformer.encoder.layer.0.output.dense.bias", False),
        ({"layers": 1}, "encoder.transformer.encoder.layer.1.output.dense.bias", True),
        ({"heads": ["mood"]}, "heads.mood.output.bias", False),
        ({}, "heads.mood.output.bias", True),
        ({}, "encoder.transformer.pooler.dense.bias", True),
    ],
)
def test_a_checkpoint_is_refused_where_what_it_leaves_out_has_changed(
    freeze: dict[str, Any], changed: str, fits: bool, bert: Path, tmp_path: Path
) -> None:
    half_way(bert, freeze=freeze).save(tmp_path)
    other = half_way(bert, steps=0, freeze=freeze)
    with torch.no_grad():
        other.model.get_parameter(changed).add_(1)
    refused = pytest.raises(DataError, match=r"weights that never learn, of init_from .* changed")
    with nullcontext() if fits else refused:
        other.load(tmp_path)
    assert other.step == (13 if fits else 0)


def test_rows_of_the_table_that_do_not_learn_are_the_checkpoint_s_too(
    bert: Path, tmp_path: Path
) -> None:
    half_way(bert).save(tmp_path)
    other = half_way(bert, steps=0)
    table = other.model.encoder.transformer.get_input_embeddings()
    table.fixed[int((table.places < 0).nonzero()[-1])] += 1
    with pytest.raises(DataError, match="never learn"):
        other.load(tmp_path)


def test_a_checkpoint_that_does_not_say_what_it_was_made_for_is_refused(
    bert: Path, tmp_path: Path
) -> None:
    half_way(bert).save(tmp_path)
    path = tmp_path / "progress.json"
    progress = json.loads(path.read_text())
    del progress["made_for"]
    path.write_text(json.dumps(progress))
    with pytest.raises(DataError, match="another version of this software"):
        half_way(bert, steps=0).load(tmp_path)


def test_a_checkpoint_is_safetensors_and_json(bert: Path, tmp_path: Path) -> None:
    half_way(bert).save(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["model.safetensors", "optimizer.safetensors", "progress.json"]
    assert names(tmp_path / "model.safetensors")
    assert names(tmp_path / "optimizer.safetensors")
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 13


def test_only_what_learns_is_stored(bert: Path, tmp_path: Path) -> None:
    half_way(bert, freeze={"encoder": True, "heads": ["mood"]}).save(tmp_path)
    stored = names(tmp_path / "model.safetensors") | names(tmp_path / "optimizer.safetensors")
    heads = {name.partition("heads.")[2].split(".")[0] for name in stored}
    assert heads == {"topic", "entities"}


def test_the_best_weights_are_stored_once_when_they_are_the_present_ones(
    bert: Path, tmp_path: Path
) -> None:
    state = half_way(bert, steps=0)
    state.epoch = 1
    state.update_best(0.5)
    state.save(tmp_path)
    assert {name.split(".")[0] for name in names(tmp_path / "model.safetensors")} == {"now"}
    other = half_way(bert, steps=0)
    other.load(tmp_path)
    assert not changed(state.best, other.best)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What a full disk looks like from inside a process."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_is_an_os_error_and_older_checkpoints_stay(
    file: str, bert: Path, tmp_path: Path
) -> None:
    state = half_way(bert)
    older, newer = tmp_path / "older", tmp_path / "newer"
    older.mkdir()
    newer.mkdir()
    state.save(older)
    room = (older / file).stat().st_size - 1
    with files_no_larger_than(room), pytest.raises(OSError, match=file):
        state.save(newer)
    assert not (newer / "progress.json").exists()
    other = half_way(bert, steps=0)
    other.load(older)
    assert other.step == 13
    assert not changed(weights(state.model), weights(other.model))
