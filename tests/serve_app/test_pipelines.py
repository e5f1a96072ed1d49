"""Token-classification answers of long texts: windows change neither tokens nor groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from tokenizers import Tokenizer

from mtl_core.answers import TokenOutput
from mtl_core.windows import Windows
from serve_app.pipelines import _words, token_classification, word_starts
from serve_app.schemas import Strategy
from tests.conftest import SENTENCES

LABELS = ("person", "place")
LONG = " ".join(SENTENCES)


@pytest.fixture(params=["bert", "roberta", "deberta-v2"])
def tokenizer(request: pytest.FixtureRequest, tiny_encoders: dict[str, Path]) -> Tokenizer:
    """With a mark for continuing pieces, with bytes, with a mark for the space before."""
    return Tokenizer.from_file(str(tiny_encoders[request.param] / "tokenizer.json"))


def answer(tokenizer: Tokenizer, max_length: int, strategy: Strategy) -> list[dict[str, Any]]:
    """What is told of LONG, whose sub-words have the same random tags in windows of any length."""
    windows = Windows(tokenizer, max_length)
    (item,) = windows.split([LONG])
    assert (len(item.windows) > 4) == (max_length < 100)
    draw, length = np.random.default_rng(3), len(item.placed[0])
    scores = draw.dirichlet(np.ones(2 * len(LABELS) + 1), length).astype(np.float32)
    tags = scores.argmax(axis=1)
    output = TokenOutput(LABELS, tags, scores.max(axis=1), np.array([length]), scores)
    (found,) = token_classification(output, [item], strategy, windows.backend, ())
    return found


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_a_text_of_several_windows_is_answered_as_one_window_of_it_would_be(
    strategy: Strategy, tokenizer: Tokenizer
) -> None:
    found = answer(tokenizer, 24, strategy)
    assert len(found) > 20
    assert found == answer(tokenizer, 1_000, strategy)


@pytest.mark.parametrize("strategy", ["first", "average", "max"])
def test_a_words_tag_is_of_its_first_of_its_mean_or_of_its_surest_piece(
    strategy: Strategy, tokenizer: Tokenizer
) -> None:
    windows = Windows(tokenizer, 1_000)
    (item,) = windows.split([LONG])
    length, starts = len(item.placed[0]), word_starts(item, windows.backend)
    assert len(starts) < length
    # So coarse that pieces are often as sure as each other: the first of them counts.
    scores = np.random.default_rng(5).integers(1, 4, (length, 5)).astype(np.float32) / 4
    rows = {
        "first": lambda word: word[0],
        "average": lambda word: word.mean(axis=0),
        "max": lambda word: word[word.max(axis=1).argmax()],
    }
    words = [rows[strategy](word) for word in np.split(scores, starts[1:])]
    pieces = list(_words(scores, item, strategy, windows.backend))
    assert [piece[0] for piece in pieces] == [word.argmax() for word in words]
    np.testing.assert_array_equal([piece[1] for piece in pieces], [word.max() for word in words])


def test_tokens_are_numbered_and_named_as_by_the_whole_texts_tokenizer(
    tokenizer: Tokenizer,
) -> None:
    found, whole = answer(tokenizer, 24, "none"), tokenizer.encode(LONG)
    assert {each["index"] for each in found} <= {*range(1, len(whole) - 1)}
    for each in found:
        number = each["index"]
        assert each["word"] == whole.tokens[number]
        start, end = whole.offsets[number]
        assert start <= each["start"] < end
