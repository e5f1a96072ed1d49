"""Texts as windows: the tokenizer of the artifact is the one that transformers reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mtl_core.artifact import load_encoder, read_manifest
from mtl_core.build import build_train_state
from mtl_core.errors import TextError
from mtl_core.predictor import EncodingStage
from mtl_core.windows import TooLong, TooMany, Windows
from tests.conftest import SENTENCES
from tests.small_runs import data, experiment, write_artifact

ENCODERS = ["bert", "distilbert", "roberta", "deberta-v2", "mpnet"]
ODD = ["  spaces \t\n", "cafe\u0301 👩‍👩‍👧", "a\u0000b", "[SEP] </s> [PAD]", "\u200b", "x" * 300]
TEXTS = [*SENTENCES, *ODD, " ".join(SENTENCES)]


@pytest.fixture(scope="module")
def bert(tiny_encoders: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_encoders["bert"] / "tokenizer.json"))


@pytest.mark.parametrize("name", ENCODERS)
def test_an_artifact_is_tokenised_as_transformers_does(
    name: str, tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    config = experiment(tiny_encoders[name])
    folder = write_artifact(
        build_train_state(config, data(config)).model, config, tmp_path / "artifact"
    )
    stage = EncodingStage.load(folder, runtime="torch-fp32")
    reference = AutoTokenizer.from_pretrained(folder / "encoder")
    assert stage.pad_id == reference.pad_token_id
    assert stage.windows.max_length == 48
    encoded = reference(TEXTS, truncation=True, max_length=48)["input_ids"]
    items = stage.windows.split(TEXTS)
    assert [item.windows[0] for item in items] == encoded
    assert max(len(item.windows) for item in items) > 1
    padded = reference(TEXTS, truncation=True, max_length=48, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states, pooled = load_encoder(folder, read_manifest(folder)).eval()(
            padded["input_ids"], padded["attention_mask"]
        )
    features = stage.encode([*items], [True] * len(items))
    np.testing.assert_allclose(features.pooled, pooled, atol=1e-5)
    (first, *_) = items
    windows, places = first.placed[1:]
    assert not windows.any()
    np.testing.assert_allclose(features.states[: len(places)], states[0][places], atol=1e-5)
    whole = reference(TEXTS, return_offsets_mapping=True)
    for item, ids, row in zip(items, whole["input_ids"], stage.windows.tokens(TEXTS), strict=True):
        assert [token["id"] for token in row] == ids
        assert item.num_tokens >= len(ids)


@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=1, max_size=120).filter(str.strip), limit=st.integers(8, 40))
def test_every_sub_word_is_in_a_window_and_has_one_place(
    text: str, limit: int, bert: Tokenizer
) -> None:
    windows = Windows(bert, limit)
    (item,) = windows.split([text])
    expected = bert.encode(text, add_special_tokens=False)
    seen: dict[int, int] = {}
    for ids, numbers in zip(item.windows, item.numbers, strict=True):
        assert len(ids) == len(numbers) <= limit
        for identifier, number in zip(ids, numbers, strict=True):
            if number >= 0:
                assert seen.setdefault(number, identifier) == identifier
    assert [seen[number] for number in sorted(seen)] == expected.ids
    assert item.ranges == expected.offsets
    offsets, homes, places = item.placed
    ends = [0, *(end for _, end in offsets)]
    assert all(
        start >= end and start < stop for end, (start, stop) in zip(ends, offsets, strict=False)
    )
    for window, place in zip(homes.tolist(), places.tolist(), strict=True):
        assert item.numbers[window][place] >= 0
    (first,) = windows.split([text], states=False)
    assert first.long == item.long == (len(item.windows) > 1)
    assert (first.windows, first.numbers) == (item.windows[:1], item.numbers[:1])
    assert first.ranges == [item.ranges[number] for number in first.numbers[0] if number >= 0]


def test_windows_leave_the_tokenizer_they_are_made_of_alone(bert: Tokenizer) -> None:
    before = bert.to_str()
    windows = Windows(bert, 8)
    windows.split(["a b c d e f g h i j k l m"])
    windows.tokens(["a b"])
    assert bert.to_str() == before
    assert len(windows.tokens(["a " * 40])[0]) == 42


class Noted:
    """A tokenizer that notes what it reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.texts += texts
        return self.tokenizer.encode_batch(texts, **options)


def test_a_limit_changes_no_sub_word(bert: Tokenizer) -> None:
    windows = Windows(bert, 16)
    items, rows = windows.split(TEXTS), windows.tokens(TEXTS)
    size, length = sum(item.num_tokens for item in items), sum(map(len, rows))
    assert windows.split(TEXTS, size) == items
    assert windows.tokens(TEXTS, most=length) == rows
    with pytest.raises(TooMany, match=f"at least {size} tokens; at most {size - 1}"):
        windows.split(TEXTS, size - 1)
    with pytest.raises(TooMany, match=f"at least {length} tokens"):
        windows.tokens(TEXTS, most=length - 1)


def test_what_is_refused_is_not_read_to_its_end(bert: Tokenizer) -> None:
    windows, texts, long = Windows(bert, 16), ["a b c"] * 50, "a b " * 100
    windows.untruncated = untruncated = Noted(windows.untruncated)
    windows.backend = backend = Noted(windows.backend)
    with pytest.raises(TooMany, match="at least 15 tokens; at most 12"):
        windows.split(texts, 12)
    with pytest.raises(TooMany, match="at least 15 tokens; at most 12"):
        windows.tokens(texts, most=12)
    assert len(backend.texts) == len(untruncated.texts) == 3
    with pytest.raises(TooLong, match="input 2 has more than the 16 tokens"):
        windows.split(["a", long, *texts], 1_000, truncate=False)
    assert len(backend.texts) == 3 + 2
    items = windows.split([long] * 9, 9 * 16, states=False)
    assert [item.num_tokens for item in items] == [16] * 9


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "empty"), (" \n\u2003", "empty"), ("a \ud800", "Unicode"), ("\udfff", "Unicode")],
)
def test_what_is_no_text_is_named_by_its_place(text: str, reason: str, bert: Tokenizer) -> None:
    with pytest.raises(TextError, match=f"text 2 .*{reason}"):
        Windows(bert, 16).split(["good", text])


def test_threads_share_windows(bert: Tokenizer) -> None:
    windows = Windows(bert, 16)
    expected = windows.split(TEXTS)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(windows.split, [TEXTS] * 50))
    assert all(items == expected for items in found)
