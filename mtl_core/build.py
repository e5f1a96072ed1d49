"""From an experiment to a model ready to train."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mtl_core.artifact import load_parts, read_manifest
from mtl_core.config import Experiment
from mtl_core.data.encoding import EncodedSplit
from mtl_core.data.prepare import Data
from mtl_core.embeddings import learn_rows
from mtl_core.encoder import SentenceEncoder
from mtl_core.errors import ArtifactError
from mtl_core.freezing import freezes_embeddings
from mtl_core.heads import Head, build_head
from mtl_core.model import MultiTaskModel
from mtl_core.state import TrainState
from mtl_core.storage import fetch
from mtl_core.weighting import build_weighting

CPU = torch.device("cpu")


def resolve_init_from(experiment: Experiment) -> Experiment:
    """An experiment file's contents with what `init_from` decides unless the file says otherwise.

    Raises:
        ArtifactError: `init_from` is no sound artifact.
    """
    if experiment.init_from is None or "max_length" in experiment.encoder.model_fields_set:
        return experiment
    window = read_manifest(fetch(experiment.init_from), check_files=False).encoder["max_length"]
    encoder = experiment.encoder.model_copy(update={"max_length": window})
    return experiment.model_copy(update={"encoder": encoder})


def build_train_state(experiment: Experiment, data: Data, device: torch.device = CPU) -> TrainState:
    """What a run starts from: a model that knows its data, and the optimiser made for it.

    Raises:
        EncoderError, ArtifactError: as `build_model`.
    """
    model = build_model(experiment, data.labels).to(device)
    fit_to_data(model, experiment, data.splits.get("train"))
    return TrainState(model, experiment, data.keys)


def build_model(experiment: Experiment, labels: Mapping[str, tuple[str, ...]]) -> MultiTaskModel:
    """A model ready to train: pretrained encoder, seeded heads, or what `init_from` holds.

    Raises:
        EncoderError: the encoder cannot be loaded.
        ArtifactError: `init_from` is no sound artifact, or does not fit the experiment.
    """
    torch.manual_seed(experiment.seed)
    carried: dict[str, Head] = {}
    if experiment.init_from is None:
        encoder = SentenceEncoder.load(experiment.encoder)
    else:
        encoder, carried = _start_from(experiment, experiment.init_from)
    heads: dict[str, Head] = dict(carried)
    for name, task in experiment.tasks.items():
        head = build_head(encoder.hidden_size, labels[name], task)
        old = carried.get(name)
        if old is not None and old.labels == head.labels and old.fits(head):
            head.load_state_dict(old.state_dict())
        heads[name] = head
    return MultiTaskModel(encoder, heads, build_weighting(experiment))


def fit_to_data(model: MultiTaskModel, experiment: Experiment, train: EncodedSplit | None) -> None:
    """Take from the training split what learning needs: label counts, and which words occur.

    Where train comes in shards neither is known: every row of the embedding table learns.
    """
    for task in experiment.tasks:
        head = model.head(task)
        counts = np.ones(head.num_outputs, dtype=np.int64)  # what named class weights do not need
        if train is not None:
            counts = train.output_counts(task, head.num_outputs)
        head.set_label_counts(counts)
    if train is None:
        return
    last = experiment.training.epochs - 1
    if not freezes_embeddings(experiment.freeze, model.encoder.num_layers, last):
        learn_rows(model.encoder.transformer, train.input_ids)


def _start_from(experiment: Experiment, artifact: str) -> tuple[SentenceEncoder, dict[str, Head]]:
    """An artifact's encoder and heads; refuses heads that a learning encoder would invalidate."""
    encoder, carried = load_parts(
        fetch(artifact), experiment.encoder.max_length, experiment.encoder.dropout
    )
    kept = [name for name in carried if name not in experiment.tasks]
    if kept and not experiment.freeze.encoder:
        raise ArtifactError(
            f"init_from: the head {kept[0]!r} of {artifact} would answer differently once the "
            f"encoder learns; set freeze.encoder: true, or train {kept[0]!r} along"
        )
    return encoder, carried
