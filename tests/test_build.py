"""Starting from an artifact: what is taken over, and what is refused."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch

from mtl_core.artifact import load_model
from mtl_core.build import build_model, build_train_state, resolve_init_from
from mtl_core.config import Experiment, TaskConfig
from mtl_core.data.examples import Corpus
from mtl_core.data.prepare import with_known_labels
from mtl_core.encoder import tokenizer_of
from mtl_core.errors import ArtifactError
from tests.small_runs import LABELS, changed, data, examples, experiment, weights, write_artifact


@pytest.fixture(scope="module")
def artifact(tiny_encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads that no seed of a test gives."""
    config = experiment(tiny_encoders["bert"], seed=99)
    model = build_train_state(config, data(config)).model
    return write_artifact(model, config, tmp_path_factory.mktemp("old") / "artifact")


def start_from(artifact: Path, tasks: set[str], **changes: bool) -> Experiment:
    """An experiment that trains these tasks of the artifact's."""
    config = experiment("not used", init_from=str(artifact), freeze=changes)
    kept = {task: spec for task, spec in config.tasks.items() if task in tasks}
    return config.model_copy(update={"tasks": kept})


def test_encoder_and_heads_go_on_from_the_artifact(artifact: Path) -> None:
    config = start_from(artifact, set(LABELS))
    assert not changed(weights(load_model(artifact)), weights(build_model(config, LABELS)))


def test_dropout_is_the_experiment_s_if_it_names_one(artifact: Path) -> None:
    config = start_from(artifact, set(LABELS))
    for dropout in (0.0, 0.37):
        encoder = config.encoder.model_copy(update={"dropout": dropout})
        model = build_model(config.model_copy(update={"encoder": encoder}), LABELS)
        rates = {
            module.p
            for module in model.encoder.transformer.modules()
            if isinstance(module, torch.nn.Dropout)
        }
        assert rates == {dropout}


def test_a_head_of_other_labels_or_another_form_starts_anew(artifact: Path) -> None:
    old = load_model(artifact)
    config = start_from(artifact, set(LABELS))
    wider = TaskConfig(kind="multilabel", hidden_size=8)
    config = config.model_copy(update={"tasks": {**config.tasks, "mood": wider}})
    new = build_model(config, {**LABELS, "topic": ("food", "phone", "rain")})
    for task in ("topic", "mood"):
        assert not torch.equal(new.head(task).output.weight, old.head(task).output.weight)
    assert torch.equal(new.head("entities").output.weight, old.head("entities").output.weight)


def test_heads_that_are_not_trained_along_need_a_frozen_encoder(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"head 'mood' .* set freeze\.encoder: true, or train"):
        build_model(start_from(artifact, {"topic", "entities"}), LABELS)
    model = build_model(start_from(artifact, {"topic", "entities"}, encoder=True), LABELS)
    assert set(model.heads) == set(LABELS)
    assert not changed(weights(load_model(artifact)), weights(model))


def test_the_window_is_the_artifacts_unless_the_file_says_otherwise(artifact: Path) -> None:
    config = start_from(artifact, set(LABELS))
    silent = config.model_copy(update={"encoder": Experiment.model_fields["encoder"].default})
    assert silent.encoder.max_length != 48
    assert resolve_init_from(silent).encoder.max_length == 48
    said = experiment("not used", init_from=str(artifact), encoder={"max_length": 32})
    assert resolve_init_from(said).encoder.max_length == 32


def test_the_artifact_may_stand_behind_a_url(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path))
    store = fsspec.filesystem("memory")
    store.put(str(artifact), f"/{tmp_path.name}", recursive=True)
    here = start_from(artifact, {"topic"}, encoder=True)
    there = here.model_copy(update={"init_from": f"memory://{tmp_path.name}"})
    silent = there.model_copy(update={"encoder": Experiment.model_fields["encoder"].default})
    assert resolve_init_from(silent).encoder.max_length == 48
    rows = Corpus({"train": examples(0, 20)}, {}, {})
    assert with_known_labels(there, rows) == with_known_labels(here, rows)
    assert tokenizer_of(there).get_vocab() == tokenizer_of(here).get_vocab()
    assert not changed(weights(build_model(here, LABELS)), weights(build_model(there, LABELS)))


def test_a_damaged_artifact_is_named_with_the_file(artifact: Path, tmp_path: Path) -> None:
    config = start_from(artifact, set(LABELS))
    copy = write_artifact(load_model(artifact), config, tmp_path / "copy")
    weights_file = copy / "encoder" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArtifactError, match=f"{weights_file}: damaged: its hash"):
        build_model(start_from(copy, set(LABELS)), LABELS)
