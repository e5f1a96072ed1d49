"""Scores equal those of scikit-learn and seqeval, and counts of shards add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import classification_report
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.metrics import precision_score as seqeval_precision
from seqeval.metrics import recall_score as seqeval_recall
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from mtl_core.data.tags import tag_names
from mtl_core.evaluation import Evaluation
from mtl_core.heads import legalise
from mtl_core.metrics import (
    PRIMARY,
    count_classes,
    count_entities,
    count_multilabel,
    empty_counts,
    mean_score,
    per_label,
    primary_scores,
    scores,
    tagged_spans,
    word_tags,
)

TYPES = ("loc", "org", "per")
TAGS = tag_names(TYPES)


def random_classes(seed: int, classes: int = 5) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    gold = random.integers(0, classes, 200)
    guess = np.where(random.random(200) < 0.6, gold, random.integers(0, classes, 200))
    return gold, guess


@pytest.mark.parametrize("seed", range(3))
def test_classification_scores_are_those_of_scikit_learn(seed: int) -> None:
    gold, guess = random_classes(seed)
    counts = empty_counts("classification", 5)
    count_classes(counts, gold, guess)
    found = scores("classification", counts)
    precision, recall, f1, _ = precision_recall_fscore_support(
        gold, guess, average="macro", zero_division=0
    )
    expected = {"precision": precision, "recall": recall, "macro_f1": f1}
    expected["accuracy"] = accuracy_score(gold, guess)
    assert found == pytest.approx(expected)
    each = precision_recall_fscore_support(gold, guess, average=None, zero_division=0)
    for label, *row in zip("abcde", *each, strict=True):
        ours = per_label("classification", counts, "abcde")[label]
        assert list(ours.values()) == pytest.approx(row)


def test_labels_that_never_occur_do_not_lower_macro_averages() -> None:
    gold, guess = np.array([0, 0, 1]), np.array([0, 3, 1])
    counts = empty_counts("classification", 6)
    count_classes(counts, gold, guess)
    expected = f1_score(gold, guess, average="macro", zero_division=0)
    assert scores("classification", counts)["macro_f1"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_multilabel_scores_are_those_of_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    gold = (random.random((80, 4)) < [0.5, 0.2, 0.05, 0.0]).astype(np.int64)
    guess = (gold ^ (random.random((80, 4)) < 0.2)).astype(bool)
    counts = empty_counts("multilabel", 4)
    count_multilabel(counts, gold, guess)
    precision, recall, f1, _ = precision_recall_fscore_support(
        gold, guess, average="micro", zero_division=0
    )
    assert scores("multilabel", counts) == pytest.approx(
        {
            "micro_f1": f1,
            "macro_f1": f1_score(gold, guess, average="macro", zero_division=0),
            "precision": precision,
            "recall": recall,
            "exact_match": accuracy_score(gold, guess),
        }
    )


tag_ids = st.integers(0, len(TAGS) - 1)
texts = st.lists(
    st.lists(st.tuples(tag_ids, tag_ids), min_size=1, max_size=8), min_size=1, max_size=6
)


def legal(tags: Any) -> Any:
    return legalise(np.array(tags, dtype=np.int64), len(TYPES))


def count_all(rows: Any) -> Any:
    counts = empty_counts("token_classification", len(TYPES))
    for gold, guess in rows:
        count_entities(counts, gold, guess)
    return counts


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@settings(max_examples=80, deadline=None)
@given(texts)
def test_entity_scores_are_those_of_strict_seqeval(rows: Any) -> None:
    pairs = [(legal([g for g, _ in row]), legal([p for _, p in row])) for row in rows]
    counts = count_all(pairs)
    gold = [[TAGS[t] for t in tags] for tags, _ in pairs]
    guess = [[TAGS[t] for t in tags] for _, tags in pairs]
    found = scores("token_classification", counts)
    strict: dict[str, Any] = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    if any(tag != "O" for tags in gold + guess for tag in tags):
        assert found["f1"] == pytest.approx(seqeval_f1(gold, guess, **strict))
        assert found["precision"] == pytest.approx(seqeval_precision(gold, guess, **strict))
        assert found["recall"] == pytest.approx(seqeval_recall(gold, guess, **strict))
        report = classification_report(gold, guess, output_dict=True, **strict)
        for name, row in per_label("token_classification", counts, TYPES).items():
            if name in report:
                theirs = report[name]
                expected = [theirs[k] for k in ("precision", "recall", "f1-score", "support")]
                assert list(row.values()) == pytest.approx(expected)
            else:
                assert row["support"] == row["f1"] == 0
    words = [
        (g, p) for gs, ps in zip(gold, guess, strict=True) for g, p in zip(gs, ps, strict=True)
    ]
    right = sum(g == p for g, p in words)
    assert found["token_accuracy"] == pytest.approx(right / len(words))


@settings(max_examples=30, deadline=None)
@given(texts, st.integers(0, 6))
def test_counts_of_two_shards_add_up_to_those_of_the_whole(rows: Any, cut: int) -> None:
    pairs = [(legal([g for g, _ in row]), legal([p for _, p in row])) for row in rows]
    assert np.array_equal(count_all(pairs), count_all(pairs[:cut]) + count_all(pairs[cut:]))


def test_counts_add_up_for_sentence_tasks_too() -> None:
    gold, guess = random_classes(0)
    whole, parts = empty_counts("classification", 5), empty_counts("classification", 5)
    count_classes(whole, gold, guess)
    for shard in (slice(0, 70), slice(70, 200)):
        part = empty_counts("classification", 5)
        count_classes(part, gold[shard], guess[shard])
        parts += part
    assert np.array_equal(whole, parts)
    assert whole.sum() == 200


def test_adjacent_entities_of_one_type_stay_two() -> None:
    assert list(tagged_spans([1, 4, 1, 0, 3, 6], 3)) == [(0, 0, 2), (0, 2, 3), (2, 4, 6)]


@pytest.mark.parametrize("kind", ["classification", "multilabel", "token_classification"])
def test_scores_of_nothing_are_zero_and_no_warning(kind: Any) -> None:
    assert set(scores(kind, empty_counts(kind, 3)).values()) == {0.0}


def projected(tags: list[str], firsts: list[int]) -> list[str]:
    ids = np.array([TAGS.index(tag) for tag in tags])
    return [TAGS[i] for i in word_tags(ids, np.array(firsts, dtype=np.int32), len(TYPES))]


@pytest.mark.parametrize(
    ("tokens", "firsts", "words"),
    [
        # One sub-word a word: the same tags.
        (["O", "B-loc", "I-loc", "O"], [0, 1, 2, 3], ["O", "B-loc", "I-loc", "O"]),
        # Each word takes its first sub-word's entity.
        (["O", "B-loc", "I-loc", "I-loc", "O"], [1, 3, 4], ["B-loc", "I-loc", "O"]),
        # What happens inside a word is not seen by it, but the next word begins the entity.
        (["B-loc", "B-loc", "I-loc"], [0, 2], ["B-loc", "B-loc"]),
        (["O", "B-per", "I-per"], [0, 2], ["O", "B-per"]),
        (["B-loc", "O", "B-loc"], [0, 2], ["B-loc", "B-loc"]),
        (["B-loc", "B-org", "I-org"], [0, 1], ["B-loc", "B-org"]),
        # Lost words are O, also in the middle of an entity and where no token is left.
        (["B-loc", "I-loc"], [0, 1, -1, -1], ["B-loc", "I-loc", "O", "O"]),
        (["B-loc", "I-loc"], [0, -1, 1], ["B-loc", "O", "B-loc"]),
        (["O"], [-1], ["O"]),
        (["O"], [], []),
    ],
)
def test_words_see_the_entity_that_their_first_sub_word_is_in(
    tokens: list[str], firsts: list[int], words: list[str]
) -> None:
    assert projected(tokens, firsts) == words


@settings(max_examples=50, deadline=None)
@given(
    st.lists(tag_ids, min_size=1, max_size=10),
    st.lists(st.integers(-1, 9), max_size=8),
)
def test_projected_tags_are_always_legal(tags: Any, firsts: list[int]) -> None:
    kept = sorted({f for f in firsts if 0 <= f < len(tags)})
    kept = kept + [-1] * firsts.count(-1)
    found = word_tags(legal(tags), np.array(kept, dtype=np.int32), len(TYPES))
    assert np.array_equal(legalise(found, len(TYPES)), found)


def test_the_primary_metric_of_each_task_is_found_in_what_evaluation_reports() -> None:
    kinds: dict[str, Any] = {"topic": "classification", "a.b": "multilabel", "x": "multilabel"}
    kinds["places"] = "token_classification"
    labels = dict.fromkeys(kinds, ("a", "b"))
    counts = {task: empty_counts(kind, 2) + (task != "x") for task, kind in kinds.items()}
    evaluation = Evaluation(kinds, labels, counts, dict.fromkeys(kinds, 0.1))
    row = {"epoch": 1.0, "objective_0": 0.3, **evaluation.flat("validation")}
    scored = {task: values[PRIMARY[kinds[task]]] for task, values in evaluation.scores().items()}
    assert primary_scores(row, "validation") == scored
    assert set(scored) == {"topic", "a.b", "places"}
    assert primary_scores(row, "test") == {}


def test_the_mean_is_over_tasks() -> None:
    assert mean_score({"a": 0.5, "b": 1.0}) == 0.75
    assert mean_score({}) == 0
