"""Scores as additive counts: merging two shards is `+`, so sharded evaluation is exact.

Shapes: C labels, E entity types, T tags (O, then E of B-, then E of I-).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl_core.config import TaskKind

Counts = NDArray[np.int64]
PRIMARY: dict[TaskKind, str] = {
    "classification": "accuracy",
    "multilabel": "micro_f1",
    "token_classification": "f1",
}
"""The metric of each kind that counts towards the mean over tasks."""


def empty_counts(kind: TaskKind, num_labels: int) -> Counts:
    """Zeros of the shape the kind counts in.

    classification (C, C): gold by predicted. multilabel (C+1, 3): true positives, predicted, gold
    a label; last row exact matches, texts, 0. token_classification (E+1, 3): the same a type;
    last row correct words, words, 0.
    """
    shape = (num_labels, num_labels) if kind == "classification" else (num_labels + 1, 3)
    return np.zeros(shape, dtype=np.int64)


def count_classes(counts: Counts, gold: Counts, predicted: Counts) -> None:
    """Add (N,) gold and predicted class ids to a confusion matrix, in place."""
    np.add.at(counts, (gold, predicted), 1)


def count_multilabel(counts: Counts, gold: Counts, predicted: NDArray[np.bool_]) -> None:
    """Add (N, C) gold and predicted label sets, in place."""
    truth = gold.astype(bool)
    counts[:-1] += np.stack([(truth & predicted).sum(0), predicted.sum(0), truth.sum(0)], axis=1)
    counts[-1, :2] += ((truth == predicted).all(axis=1).sum(), len(gold))


def count_entities(counts: Counts, gold: Counts, predicted: Counts) -> None:
    """Add one text's (W,) gold and predicted word tags, in place.

    Strict entity level as seqeval's `mode="strict", scheme=IOB2`: type and both ends must agree.
    """
    num_types = len(counts) - 1
    truth, found = (set(tagged_spans(tags.tolist(), num_types)) for tags in (gold, predicted))
    for column, group in enumerate((truth & found, found, truth)):
        for kind, _, _ in group:
            counts[kind, column] += 1
    counts[-1, :2] += (int((gold == predicted).sum()), len(gold))


def tagged_spans(tags: Sequence[int], num_types: int) -> Iterator[tuple[int, int, int]]:
    """(type, first, end) of each entity in legal tag ids."""
    start = -1
    for position, tag in enumerate([*tags, 0]):
        if start >= 0 and tag <= num_types:
            yield tags[start] - 1, start, position
            start = -1
        if 1 <= tag <= num_types:
            start = position


def word_tags(token_tags: Counts, word_tokens: NDArray[np.int32], num_types: int) -> Counts:
    """Sub-word tags seen from words: each word takes the entity its first sub-word is in.

    Args:
        token_tags: (L,) legal tag ids.
        word_tokens: (W,) each word's first sub-word, -1 where the tokenizer kept none: O.

    Returns:
        (W,) legal tag ids: an entity that began inside a word begins at the next word.
    """
    entity = np.cumsum((token_tags >= 1) & (token_tags <= num_types))
    kept = word_tokens >= 0
    tags = np.where(kept, token_tags[word_tokens], 0)
    kind = np.where(tags > num_types, tags - num_types, tags)
    member = np.where(tags > 0, entity[word_tokens], 0)
    continues = np.concatenate([[False], (member[1:] == member[:-1]) & (member[1:] > 0)])
    return np.where(continues, kind + num_types, kind).astype(np.int64)


def scores(kind: TaskKind, counts: Counts) -> dict[str, float]:
    """Metric name → value between 0 and 1."""
    if kind == "classification":
        return _classification_scores(counts)
    true, predicted, gold = counts[:-1].sum(axis=0)
    precision, recall, f1 = _prf(true, predicted, gold)
    right, total = counts[-1, :2]
    if kind == "multilabel":
        macro = np.mean([_prf(*row)[2] for row in counts[:-1]])
        return {
            "micro_f1": f1,
            "macro_f1": float(macro),
            "precision": precision,
            "recall": recall,
            "exact_match": _ratio(right, total),
        }
    return {
        "f1": f1,
        "precision": precision,
        "recall": recall,
        "token_accuracy": _ratio(right, total),
    }


def metric_names(kind: TaskKind) -> list[str]:
    """What `scores` reports for a kind of task."""
    return list(scores(kind, empty_counts(kind, 1)))


def _classification_scores(counts: Counts) -> dict[str, float]:
    """Accuracy, and macro averages over labels that occur or are predicted, as scikit-learn."""
    diagonal, predicted, gold = np.diag(counts), counts.sum(axis=0), counts.sum(axis=1)
    rows = [_prf(t, p, g) for t, p, g in zip(diagonal, predicted, gold, strict=True) if p + g > 0]
    precision, recall, f1 = np.mean(rows, axis=0) if rows else (0.0, 0.0, 0.0)
    return {
        "accuracy": _ratio(diagonal.sum(), counts.sum()),
        "macro_f1": float(f1),
        "precision": float(precision),
        "recall": float(recall),
    }


def per_label(kind: TaskKind, counts: Counts, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Label or entity type → precision, recall, f1 and support."""
    if kind == "classification":
        rows = np.stack([np.diag(counts), counts.sum(axis=0), counts.sum(axis=1)], axis=1)
    else:
        rows = counts[:-1]
    table = {}
    for name, row in zip(labels, rows, strict=True):
        precision, recall, f1 = _prf(*row)
        table[name] = {"precision": precision, "recall": recall, "f1": f1, "support": int(row[2])}
    return table


def primary_scores(row: Mapping[str, Any], split: str) -> dict[str, float]:
    """Task → its primary metric in a row of `split/task/metric`; no kind reports that of another.

    A task that the split has no label of is left out.
    """
    parts = {key: key.split("/") for key in row}
    return {
        path[1]: row[key]
        for key, path in parts.items()
        if len(path) == 3 and path[0] == split and path[2] in PRIMARY.values()
    }


def mean_score(primary: Mapping[str, float]) -> float:
    """The mean over tasks of each one's primary metric."""
    return sum(primary.values()) / len(primary) if primary else 0.0


def _prf(true: int, predicted: int, gold: int) -> tuple[float, float, float]:
    return _ratio(true, predicted), _ratio(true, gold), _ratio(2 * true, predicted + gold)


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0
