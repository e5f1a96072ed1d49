"""Encoded splits on disk: found again by content, whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_core.config import TaskConfig
from mtl_core.data import cache
from mtl_core.data.cache import content_key, encode_cached, load_split
from mtl_core.data.encoding import EncodedSplit, encode_split
from mtl_core.data.examples import Example, Span
from mtl_core.encoder import load_tokenizer

TASKS = {
    "intent": TaskConfig(kind="classification"),
    "topics": TaskConfig(kind="multilabel"),
    "ner": TaskConfig(kind="token_classification"),
}
LABELS = {"intent": ("ask", "tell"), "topics": ("x", "y", "z"), "ner": ("loc", "per")}
ROWS = [
    Example("Maria sang", {"intent": "tell", "topics": ("z", "x")}),
    Example("in Berlin", {"ner": (Span(3, 9, "loc"),), "topics": ()}, ((0, 2), (3, 9))),
    Example("hello", {"intent": "ask", "ner": ()}, ((0, 5),)),
]


@pytest.fixture(scope="module")
def tokenizers(tiny_encoders: dict[str, Path]) -> dict[str, Any]:
    return {name: load_tokenizer(str(tiny_encoders[name])) for name in ("bert", "mpnet")}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path))
    return tmp_path / "encoded"


def assert_same(one: EncodedSplit, other: EncodedSplit) -> None:
    for name in ("input_ids", "starts", "word_tokens", "word_starts"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for name in ("targets", "present", "word_tags"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[task], theirs[task]) for task in mine), name
    assert one.num_truncated == other.num_truncated


def test_the_second_time_files_are_mapped_and_nothing_is_tokenised(
    own_cache: Path, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["bert"]
    key, first = encode_cached(ROWS, TASKS, LABELS, tokenizer, 32)
    assert_same(first, encode_split(ROWS, TASKS, LABELS, tokenizer, 32))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the tokenizer was called")

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)
    again, second = encode_cached(ROWS, TASKS, LABELS, tokenizer, 32)
    assert again == key
    assert isinstance(second.input_ids, np.memmap)
    assert isinstance(second.targets["ner"], np.memmap)
    assert_same(first, second)


def test_the_key_changes_with_all_that_the_arrays_depend_on(tokenizers: dict[str, Any]) -> None:
    other_kind = TASKS | {"intent": TaskConfig(kind="multilabel")}
    unlabelled = [Example(ROWS[0].text, {}), *ROWS[1:]]
    bert = tokenizers["bert"]
    variants: list[Any] = [
        (ROWS, TASKS, LABELS, bert, 32),
        (ROWS, TASKS, LABELS, bert, 33),
        (ROWS, TASKS, LABELS | {"intent": ("tell", "ask")}, bert, 32),
        (ROWS, other_kind, LABELS, bert, 32),
        (ROWS, TASKS, LABELS, tokenizers["mpnet"], 32),
        (ROWS[::-1], TASKS, LABELS, bert, 32),
        (unlabelled, TASKS, LABELS, bert, 32),
    ]
    keys = [content_key(*variant) for variant in variants]
    assert len(set(keys)) == len(keys)
    bert("what a tokenizer was asked before", truncation=True, max_length=5, padding="max_length")
    assert content_key(*variants[0]) == keys[0]


@pytest.mark.parametrize("name", ["starts.npy", "arrays.json"])
@pytest.mark.parametrize("emptied", [False, True])
def test_a_damaged_cache_is_as_good_as_none_and_replaced(
    own_cache: Path, tokenizers: dict[str, Any], name: str, emptied: bool
) -> None:
    key, first = encode_cached(ROWS, TASKS, LABELS, tokenizers["bert"], 32)
    (own_cache / key / name).unlink()
    if emptied:
        (own_cache / key / name).touch()
    assert load_split(key) is None
    _, again = encode_cached(ROWS, TASKS, LABELS, tokenizers["bert"], 32)
    assert_same(first, again)
    assert load_split(key) is not None


def _die_while_writing(folder: str, key: str, split: EncodedSplit) -> None:
    os.environ["MTL_CACHE"] = folder
    save, left = np.save, [3]

    def save_some(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*args)

    cache.np.save = save_some  # type: ignore[assignment]
    cache.save_split(key, split)


def test_a_writer_that_is_killed_leaves_nothing_to_see(
    own_cache: Path, tokenizers: dict[str, Any]
) -> None:
    split = encode_split(ROWS, TASKS, LABELS, tokenizers["bert"], 32)
    process = multiprocessing.get_context("fork").Process(
        target=_die_while_writing, args=(str(own_cache.parent), "key", split)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert any(own_cache.iterdir()), "the writer was killed before it wrote anything"
    assert load_split("key") is None
    cache.save_split("key", split)
    loaded = load_split("key")
    assert loaded is not None
    assert_same(loaded, split)


def _write_when_told(folder: str, split: EncodedSplit, barrier: Any) -> None:
    os.environ["MTL_CACHE"] = folder
    for turn in range(20):
        barrier.wait(30)
        cache.save_split(f"key{turn}", split)


def test_two_processes_may_write_the_same_key_at_once(
    own_cache: Path, tokenizers: dict[str, Any]
) -> None:
    split = encode_split(ROWS, TASKS, LABELS, tokenizers["bert"], 32)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=_write_when_told, args=(str(own_cache.parent), split, barrier))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for turn in range(20):
        loaded = load_split(f"key{turn}")
        assert loaded is not None
        assert_same(loaded, split)
    assert not list(own_cache.glob("*.partial"))
