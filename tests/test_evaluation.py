"""Scores of a split agree with the libraries that people compare against."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_core import evaluation, metrics
from mtl_core.build import build_train_state
from mtl_core.config import Experiment
from mtl_core.data.batching import evaluation_batches
from mtl_core.data.encoding import EncodedSplit, resolve_labels
from mtl_core.data.examples import Corpus
from mtl_core.data.prepare import Data, encode
from mtl_core.data.sources import read_corpus
from mtl_core.data.tags import tag_names
from mtl_core.evaluation import Evaluation, evaluate
from mtl_core.model import MultiTaskModel
from mtl_core.world import World
from tests.small_runs import data, experiment, learned, train

Tags = list[list[str]]


@pytest.fixture(scope="module")
def bert(tiny_encoders: dict[str, Path]) -> Path:
    return tiny_encoders["bert"]


@pytest.fixture(scope="module")
def expert(bert: Path) -> tuple[MultiTaskModel, EncodedSplit]:
    """A model and the texts that it knows by heart."""
    state, encoded, _ = learned(bert)
    return state.model, encoded.splits["train"]


def snips(root: Path, encoder: Path, epochs: int = 6) -> tuple[Experiment, Data]:
    """Intent and slots of a part of SNIPS, in texts short and long enough to be cut."""
    config = Experiment.model_validate(
        {
            "name": "snips",
            "tasks": {
                "intent": {"kind": "classification", "dropout": 0.0},
                "slots": {"kind": "token_classification", "dropout": 0.0},
            },
            "data": [
                {
                    "path": str(root / "snips"),
                    "columns": {"words": "tokens", "intent": "label", "slots": "tags"},
                    "limit": 600,
                }
            ],
            "encoder": {"model": str(encoder), "max_length": 40},
            "optim": {"learning_rate": 5e-3, "head_learning_rate": 5e-2},
            "training": {"epochs": epochs, "precision": "fp32"},
        }
    )
    corpus = read_corpus(config.data, config.tasks, config.seed)
    splits = {name: corpus.splits[name] for name in ("train", "validation")}
    everything = Corpus({"train": [e for part in splits.values() for e in part]}, {}, {})
    return config, encode(Corpus(splits, {}, {}), config, resolve_labels(everything, config.tasks))


def predicted_word_tags(
    model: MultiTaskModel, encoded: Data, task: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Evaluation, list[Any]]:
    """An evaluation, and the tag ids that it gave to the words of each text of validation."""
    seen: list[Any] = []
    count = metrics.count_entities

    def listen(counts: Any, gold: Any, predicted: Any) -> None:
        seen.append(predicted)
        count(counts, gold, predicted)

    monkeypatch.setattr(evaluation.metrics, "count_entities", listen)
    split = encoded.splits["validation"]
    result = evaluate(model, split, tasks=[task])
    order = np.concatenate(list(evaluation_batches(split)))
    return result, [seen[place] for place in np.argsort(order)]


@pytest.mark.slow
def test_entity_scores_on_snips_are_those_of_seqeval(
    mtl_data: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    config, encoded = snips(mtl_data, bert)
    state, _ = train(config, encoded)
    result, predicted = predicted_word_tags(state.model, encoded, "slots", monkeypatch)
    assert encoded.splits["validation"].num_truncated > 0
    names = tag_names(encoded.labels["slots"])
    guess = [[names[tag] for tag in tags] for tags in predicted]
    lines = (mtl_data / "snips" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    gold = [json.loads(line)["tags"] for line in lines]

    theirs = classification_report(
        gold, guess, mode="strict", scheme=IOB2, output_dict=True, zero_division=0
    )
    ours = result.scores()["slots"]
    assert 0.1 < ours["f1"] < 0.95
    for name, key in (("f1", "f1-score"), ("precision", "precision"), ("recall", "recall")):
        assert ours[name] == pytest.approx(theirs["micro avg"][key], abs=1e-12)
    table = metrics.per_label(
        "token_classification", result.counts["slots"], encoded.labels["slots"]
    )
    for label, row in table.items():
        if label in theirs:
            assert row["f1"] == pytest.approx(theirs[label]["f1-score"], abs=1e-12)
            assert row["precision"] == pytest.approx(theirs[label]["precision"], abs=1e-12)
            assert row["recall"] == pytest.approx(theirs[label]["recall"], abs=1e-12)
            assert row["support"] == theirs[label]["support"]
        else:
            assert row["support"] == row["f1"] == 0
    words = [
        (g, p)
        for row, other in zip(gold, guess, strict=True)
        for g, p in zip(row, other, strict=True)
    ]
    assert ours["token_accuracy"] == pytest.approx(np.mean([g == p for g, p in words]))


def test_a_perfect_model_scores_one_on_everything(
    expert: tuple[MultiTaskModel, EncodedSplit],
) -> None:
    result = evaluate(*expert)
    assert result.score("mean") == pytest.approx(1.0, abs=0.02)
    assert result.score("topic/accuracy") == result.score("topic") == 1.0
    assert all(loss < 0.2 for loss in result.losses.values())


def test_words_lost_to_truncation_count_as_missed(
    bert: Path, expert: tuple[MultiTaskModel, EncodedSplit]
) -> None:
    model, split = expert
    config = experiment(bert, encoder={"max_length": 10})
    cut = data(config, train=32, everything=True).splits["train"]
    assert cut.num_truncated == 32
    whole, part = evaluate(model, split), evaluate(model, cut)
    assert part.scores()["entities"]["recall"] < 0.8 < whole.scores()["entities"]["recall"]
    gold, words = np.s_[:-1, 2], np.s_[-1, 1]
    for place in (gold, words):
        assert (whole.counts["entities"][place] == part.counts["entities"][place]).all()


def test_evaluation_leaves_modes_and_weights_as_they_were(bert: Path) -> None:
    config = experiment(bert, freeze={"layers": 1})
    encoded = data(config)
    state = build_train_state(config, encoded)
    state.model.train()
    state.model.encoder.transformer.embeddings.eval()
    modes = [module.training for module in state.model.modules()]
    assert True in modes
    assert False in modes
    first = evaluate(state.model, encoded.splits["validation"])
    assert [module.training for module in state.model.modules()] == modes
    second = evaluate(state.model, encoded.splits["validation"])
    assert first.losses == second.losses


def test_a_task_without_labels_in_a_split_has_no_score(bert: Path) -> None:
    config = experiment(bert)
    encoded = data(config, validation=30)
    split = encoded.splits["validation"]
    split.present["mood"] = np.zeros_like(split.present["mood"])
    result = evaluate(build_train_state(config, encoded).model, split)
    assert set(result.scores()) == set(result.losses) == {"topic", "entities"}
    assert result.score("mood/micro_f1") == 0.0
    assert not [name for name in result.flat("validation") if "mood" in name]


class Alone(World):
    """A rank whose sums over ranks are its own part."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_ranks_count_every_batch_once(
    expert: tuple[MultiTaskModel, EncodedSplit], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(evaluation_batches, batch_tokens=64)
    monkeypatch.setattr(evaluation, "evaluation_batches", small)
    whole = evaluate(*expert)
    parts = [evaluate(*expert, Alone(rank, 3)) for rank in range(3)]
    for task, counts in whole.counts.items():
        assert all(part.counts[task].any() for part in parts)
        np.testing.assert_array_equal(sum(part.counts[task] for part in parts), counts)


def test_only_the_tasks_asked_for_are_scored(bert: Path) -> None:
    config = experiment(bert)
    encoded = data(config)
    result = evaluate(
        build_train_state(config, encoded).model, encoded.splits["validation"], tasks=["topic"]
    )
    assert set(result.counts) == set(result.losses) == {"topic"}


def test_losses_are_means_over_labels(bert: Path) -> None:
    config = experiment(bert)
    encoded = data(config, validation=5)
    model = build_train_state(config, encoded).model.eval()
    split = encoded.splits["validation"]
    sums = dict.fromkeys(config.tasks, 0.0)
    for number in range(len(split)):
        ids = torch.tensor(split.input_ids[split.starts[number] : split.starts[number + 1]])[None]
        with torch.inference_mode():
            _, pooled = model.encoder(ids.long(), torch.ones_like(ids).long())
            if split.present["topic"][number]:
                target = torch.tensor([int(split.targets["topic"][number])])
                logits = model.head("topic")(pooled)
                sums["topic"] += float(torch.nn.functional.cross_entropy(logits, target))
    losses = evaluate(model, split).losses
    assert losses["topic"] == pytest.approx(sums["topic"] / split.present["topic"].sum(), rel=1e-5)
