"""From arrays to answers: parts of a batch say what the whole says, decoding is per text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_core.answers import Features, SentenceOutput, TokenOutput, flat_types, flatten, run_head
from mtl_core.config import TaskConfig
from mtl_core.heads import Head, TokenClassificationHead, build_head
from mtl_core.windows import Tokenized

TYPES = ("person", "place")
NUM_TAGS = 1 + 2 * len(TYPES)
LENGTHS = [3, 0, 1, 7, 0, 5]
HIDDEN = 8


def head(kind: Any, labels: tuple[str, ...] = TYPES, **settings: Any) -> Head:
    torch.manual_seed(3)
    built = build_head(HIDDEN, labels, TaskConfig(kind=kind, **settings)).eval()
    torch.nn.init.normal_(built.output.weight, std=2.0)
    return built


def features(lengths: list[int]) -> Features:
    draw = np.random.default_rng(4)
    return Features(
        draw.normal(size=(len(lengths), HIDDEN)).astype(np.float32),
        draw.normal(size=(sum(lengths), HIDDEN)).astype(np.float32),
        np.array(lengths, dtype=np.int64),
    )


def items(lengths: list[int]) -> list[Tokenized]:
    """Texts of one window, a character a sub-word."""
    return [
        Tokenized("abcdefghij"[:n], [[0] * n], [list(range(n))], [(i, i + 1) for i in range(n)])
        for n in lengths
    ]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    seed=st.integers(0, 2**32 - 1),
    decoding=st.sampled_from(["viterbi", "greedy"]),
    loudness=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_texts_are_decoded_together_as_one_by_one(
    lengths: list[int], seed: int, decoding: str, loudness: float
) -> None:
    built = head("token_classification", decoding=decoding)
    assert isinstance(built, TokenClassificationHead)
    draw = np.random.default_rng(seed)
    logits = (loudness * draw.normal(size=(sum(lengths), NUM_TAGS))).astype(np.float32)
    ends = np.cumsum(lengths, dtype=np.int64)
    alone = [
        built.decode(logits[end - length : end]) for end, length in zip(ends, lengths, strict=True)
    ]
    together = built.decide(logits, np.array(lengths, dtype=np.int64))
    np.testing.assert_array_equal(together, np.concatenate([np.zeros(0, np.int64), *alone]))


def test_a_text_cannot_continue_the_entity_of_the_text_before() -> None:
    built = head("token_classification")
    assert isinstance(built, TokenClassificationHead)
    logits = np.full((2, NUM_TAGS), -9.0, dtype=np.float32)
    logits[0, 1] = logits[1, 3] = 9.0  # B-person, then I-person
    one = built.decide(logits, np.array([2]))
    two = built.decide(logits, np.array([1, 1]))
    assert one.tolist() == [1, 3]
    assert two[0] == 1
    assert two[1] != 3


@pytest.mark.parametrize("all_tags", [False, True])
def test_a_part_says_what_the_whole_says(all_tags: bool) -> None:
    whole = features(LENGTHS)
    output = run_head(head("token_classification"), whole, all_tags)
    assert isinstance(output, TokenOutput)
    assert (output.scores is not None) == all_tags
    texts = items(LENGTHS)
    every = list(output.predictions(texts))
    assert sum(map(len, every)) > 3
    for first in range(len(LENGTHS) + 1):
        for last in range(first, len(LENGTHS) + 1):
            part = output.part(first, last)
            assert list(part.predictions(texts[first:last])) == every[first:last]
            assert part.lengths.tolist() == LENGTHS[first:last]
            if part.scores is not None:
                assert part.scores.shape == (sum(LENGTHS[first:last]), NUM_TAGS)
                chosen = part.scores[np.arange(len(part.tags)), part.tags]
                np.testing.assert_array_equal(chosen, part.probabilities)


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_a_part_of_sentences_says_what_the_whole_says(kind: str) -> None:
    output = run_head(head(kind, ("a", "b", "c")), features(LENGTHS))
    assert isinstance(output, SentenceOutput)
    texts = items(LENGTHS)
    every = list(output.predictions(texts))
    for first in range(len(LENGTHS)):
        part = output.part(first, first + 2)
        assert list(part.predictions(texts[first : first + 2])) == every[first : first + 2]


@pytest.mark.parametrize("rows", [[0], [3, 5], [5, 0, 3], [1], [0, 1, 2, 3, 4, 5]])
def test_chosen_texts_are_answered_as_among_all(rows: list[int]) -> None:
    whole = features(LENGTHS)
    chosen = whole.select(rows, "token")
    assert chosen.lengths.tolist() == [LENGTHS[row] for row in rows]
    built = head("token_classification")
    every: Any = run_head(built, whole, all_tags=True)
    mine: Any = run_head(built, chosen, all_tags=True)
    parts = [every.part(row, row + 1) for row in rows]
    np.testing.assert_array_equal(mine.tags, np.concatenate([part.tags for part in parts]))
    np.testing.assert_allclose(
        mine.scores, np.concatenate([part.scores for part in parts]), atol=1e-6
    )
    sentences = Features(whole.pooled, whole.states[:0], whole.lengths).select(rows, "sentence")
    np.testing.assert_array_equal(sentences.pooled, whole.pooled[rows])
    assert len(chosen.pooled) == len(sentences.states) == 0


def test_half_precision_states_change_little() -> None:
    whole = features(LENGTHS)
    half = Features(whole.pooled, whole.states.astype(np.float16), whole.lengths)
    built = head("token_classification")
    exact: Any = run_head(built, whole, all_tags=True)
    near: Any = run_head(built, half, all_tags=True)
    np.testing.assert_allclose(near.scores, exact.scores, atol=5e-3)


def test_probabilities_are_softmax_or_sigmoid_and_best_is_the_highest_logit() -> None:
    whole = features(LENGTHS)
    pooled = torch.from_numpy(whole.pooled)
    with torch.inference_mode():
        for kind, expected in (
            ("classification", lambda logits: torch.softmax(logits, -1)),
            ("multilabel", torch.sigmoid),
        ):
            built = head(kind, ("a", "b", "c"))
            output: Any = run_head(built, whole)
            np.testing.assert_allclose(output.scores, expected(built(pooled)), atol=1e-6)
            answers = output.predictions(items(LENGTHS))
            for row, answer in zip(output.scores, answers, strict=True):
                if kind == "classification":
                    assert answer["label"] == "abc"[int(row.argmax())]
                else:
                    assert answer["labels"] == [
                        n for n, p in zip("abc", row, strict=True) if p >= 0.5
                    ]


def test_a_label_whose_probability_is_the_threshold_is_given() -> None:
    built = head("multilabel", threshold=0.5)
    for parameter in built.output.parameters():
        torch.nn.init.zeros_(parameter)
    output = run_head(built, features(LENGTHS))
    assert (output.scores == 0.5).all()
    for answer in output.predictions(items(LENGTHS)):
        assert answer["labels"] == list(TYPES)


def test_answers_become_columns_of_known_types() -> None:
    entity = {"entity_group": "person", "score": 0.5, "word": "Zoë", "start": 0, "end": 3}
    row = {
        "topic": {"label": "food", "score": 0.5, "scores": {"food": 0.5}},
        "mood": {"labels": ["good"], "scores": {"good": 0.9}},
        "entities": [entity],
    }
    columns = {"topic": "food", "topic_score": 0.5, "mood": ["good"], "entities": [entity]}
    assert flatten(row) == columns
    types = flat_types(
        {"topic": "classification", "mood": "multilabel", "entities": "token_classification"}
    )
    assert types == {name: pa.array([value]).type for name, value in columns.items()}
