"""A corpus of three tasks that a tiny encoder can learn, and training on it."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl_core.artifact import (
    SCHEMA_VERSION,
    Manifest,
    describe_encoder,
    library_versions,
    save_weights,
    write_manifest,
)
from mtl_core.build import build_train_state
from mtl_core.config import Experiment, dump_experiment
from mtl_core.data.examples import Corpus, Example, Span
from mtl_core.data.prepare import Data, encode, prepare
from mtl_core.loop import Event, fit
from mtl_core.model import MultiTaskModel
from mtl_core.state import TrainState
from mtl_core.world import World

LABELS = {
    "topic": ("food", "phone", "music"),
    "mood": ("good", "bad", "late"),
    "entities": ("person", "place"),
}
TOPICS = {
    "food": "the food at the table",
    "phone": "a new phone",
    "music": "the song on a playlist",
}
MOODS = {"good": "wonderful", "bad": "cold", "late": "in two hours"}
PERSONS = ("Maria Lopez", "Zoë", "Maria Zoë Lopez")
PLACES = ("Berlin", "Lisbon", "São Paulo", "Grand Hotel")


def example(number: int, tasks: set[str]) -> Example:
    """A made-up sentence that carries labels of these tasks."""
    draw = random.Random(number)
    topic = draw.choice(list(TOPICS))
    moods = tuple(mood for mood in MOODS if draw.random() < 0.5)
    pieces = [("person", draw.choice(PERSONS)), ("", "had"), ("", TOPICS[topic]), ("", "in")]
    pieces += [("place", draw.choice(PLACES)), *(("", MOODS[mood]) for mood in moods)]
    text, words, spans = "", [], []
    for kind, piece in pieces:
        if kind:
            spans.append(Span(len(text), len(text) + len(piece), kind))
        for word in piece.split():
            words.append((len(text), len(text) + len(word)))
            text += word + " "
    targets = {"topic": topic, "mood": moods, "entities": tuple(spans)}
    return Example(text.rstrip(), {t: targets[t] for t in targets if t in tasks}, tuple(words))


def examples(first: int, count: int, everything: bool = False) -> list[Example]:
    """Sentences, most with labels of some tasks only; the last task is the rarest."""
    some = [{"topic", "mood", "entities"}, {"topic"}, {"topic", "mood"}, {"topic"}, {"entities"}]
    return [example(i, some[0] if everything else some[i % 5]) for i in range(first, first + count)]


def write_rows(path: Path, rows: Sequence[Example]) -> Path:
    """Examples as the JSON lines that a source reads."""
    lines = []
    for row in rows:
        targets = {
            task: [span._asdict() for span in target if isinstance(span, Span)] or target
            for task, target in row.targets.items()
        }
        lines.append(json.dumps({"text": row.text, **targets}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def experiment(folder: Path | str, /, **changes: Any) -> Experiment:
    """No dropout, fp32 and no clipping, unless `section={field: value}` says otherwise."""
    kinds = {"topic": "classification", "mood": "multilabel", "entities": "token_classification"}
    settings: dict[str, Any] = {
        "name": "small",
        "tasks": {task: {"kind": kind, "dropout": 0.0} for task, kind in kinds.items()},
        "data": [{"path": "none.jsonl", "columns": {"text": "text"} | {t: t for t in kinds}}],
        "seed": 7,
    }
    sections: dict[str, dict[str, Any]] = {
        "encoder": {"model": str(folder), "max_length": 48, "dropout": 0.0},
        "optim": {"learning_rate": 2e-4, "max_grad_norm": None},
        "training": {"epochs": 4, "batch_size": 4, "precision": "fp32"},
    }
    for name, change in changes.items():
        if name == "tasks":
            for task in kinds:
                settings["tasks"][task].update(change)
        elif isinstance(change, Mapping):
            sections[name] = {**sections.get(name, {}), **change}
        else:
            settings[name] = change
    return Experiment.model_validate(settings | sections)


def data(
    config: Experiment, train: int = 40, validation: int = 30, everything: bool = False
) -> Data:
    """The corpus as the experiment's encoder sees it."""
    splits = {
        "train": examples(0, train, everything),
        "validation": examples(10_000, validation, everything),
    }
    return encode(Corpus(splits, {}, {}), config, LABELS)


def in_shards(folder: Path, config: Experiment, texts: int) -> tuple[Experiment, Data]:
    """The experiment on files of the corpus, 50 rows and 30 to validate, and what is made of it."""
    rows = {"train": examples(0, 50), "validation": examples(10_000, 30)}
    for split, found in rows.items():
        write_rows(folder / f"{split}.jsonl", found)
    raw = config.model_dump(mode="json")
    raw["data"][0]["path"] = str(folder)
    raw["training"]["shard_texts"] = texts
    for task, labels in LABELS.items():
        raw["tasks"][task]["labels"] = labels
    sharded = Experiment.model_validate(raw)
    return sharded, prepare(sharded)


def train(
    config: Experiment, encoded: Data, world: World | None = None
) -> tuple[TrainState, list[Event]]:
    """A whole run and what it told."""
    state = build_train_state(config, encoded)
    return state, list(fit(state, encoded, config, world))


def learned(folder: Path | str, /, **changes: Any) -> tuple[TrainState, Data, list[Event]]:
    """A model that knows 32 texts, its training and validation data, by heart."""
    return _learned(folder, **changes) if changes else copy.deepcopy(_learned_once(folder))


def _learned(folder: Path | str, /, **changes: Any) -> tuple[TrainState, Data, list[Event]]:
    rates = {"learning_rate": 5e-3, "head_learning_rate": 5e-2, "max_grad_norm": 1.0}
    settings = {"optim": rates, "training": {"epochs": 60, "batch_size": 8}} | changes
    config = experiment(folder, **settings)
    encoded = data(config, train=32, everything=True)
    encoded.splits["validation"] = encoded.splits["train"]
    encoded.keys["validation"] = encoded.keys["train"]
    state, events = train(config, encoded)
    return state, encoded, events


_learned_once = functools.cache(_learned)
"""Files of tests that run in one process share what it gives."""


def first_gradients(state: TrainState) -> dict[str, Tensor]:
    """A dict that fills with the gradients that the first optimiser step to come takes, clipped."""
    seen: dict[str, Tensor] = {}

    def look(*_: Any) -> None:
        if not seen:
            gradients = {n: p.grad for n, p in state.model.named_parameters()}
            seen.update({n: g.clone() for n, g in gradients.items() if g is not None})

    assert state.optimizer is not None
    state.optimizer.register_step_post_hook(look)
    return seen


def weights(model: MultiTaskModel) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit-identical."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def write_artifact(
    model: MultiTaskModel, config: Experiment, folder: Path, encoded: Data | None = None
) -> Path:
    """The artifact of a model without any scores, which knows its data if that is given."""
    folder.mkdir(parents=True)
    save_weights(model, folder)
    (folder / "experiment.yaml").write_text(dump_experiment(config), encoding="utf-8")
    tasks = {
        task: {"kind": head.kind, "labels": list(head.labels), "metrics": {}}
        for task, head in model.head_items
    }
    encoder = describe_encoder(folder, config.encoder.model)
    texts = encoded.summary() if encoded else {}
    manifest = Manifest(SCHEMA_VERSION, config.name, tasks, encoder, texts, library_versions(), {})
    write_manifest(folder, manifest)
    return folder
