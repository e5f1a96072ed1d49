"""The demo corpus: what it promises about its rows, its spans and its test split."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import pytest

from mtl_core.data import demo_frames, demo_opinions
from mtl_core.data.demo import ENTITY_TYPES, SENTIMENTS, demo_corpus
from mtl_core.data.demo_frames import Pool
from mtl_core.data.examples import Example, Span

Splits = dict[str, list[Example]]

DIGEST = """
import hashlib
from mtl_core.data.demo import demo_corpus
print(hashlib.sha256(repr(demo_corpus(7)).encode()).hexdigest())
"""


@pytest.fixture(scope="module", params=[42, 0, 1], ids=lambda seed: f"seed={seed}")
def splits(request: pytest.FixtureRequest) -> Splits:
    return demo_corpus(request.param)


def entities(example: Example) -> list[tuple[str, str]]:
    """Name as written and type of each entity."""
    spans = [span for span in example.targets.get("entities", ()) if isinstance(span, Span)]
    return [(example.text[span.start : span.end], span.label) for span in spans]


def occurs(phrase: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", text) is not None


def joined(rows: Iterable[Example]) -> str:
    return "\n".join(row.text.casefold() for row in rows)


def opinion_pools() -> list[Pool]:
    by_sentiment = [demo_opinions.PREDICATES, demo_opinions.CLAUSES, demo_opinions.HIGHLIGHTS]
    for domain in demo_opinions.DOMAINS:
        by_sentiment += [domain.adjectives, domain.predicates]
    return [pools[sentiment] for pools in by_sentiment for sentiment in ("negative", "positive")]


def test_the_splits_have_the_announced_sizes(splits: Splits) -> None:
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sizes == {"train": 1600, "validation": 200, "test": 400}


def test_no_text_occurs_twice_even_in_another_case(splits: Splits) -> None:
    texts = [row.text.casefold() for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_two_in_five_rows_carry_one_task_and_one_in_five_carries_both(splits: Splits) -> None:
    for rows in splits.values():
        carried = Counter(frozenset(row.targets) for row in rows)
        assert carried[frozenset({"sentiment"})] == 0.4 * len(rows)
        assert carried[frozenset({"entities"})] == 0.4 * len(rows)
        assert carried[frozenset({"sentiment", "entities"})] == 0.2 * len(rows)


def test_sentiments_are_balanced_in_every_split(splits: Splits) -> None:
    for rows in splits.values():
        counts = Counter(row.targets["sentiment"] for row in rows if "sentiment" in row.targets)
        assert set(counts) == set(SENTIMENTS)
        assert max(counts.values()) < 1.15 * min(counts.values())


def test_every_entity_type_is_at_least_a_tenth_of_the_entities(splits: Splits) -> None:
    for rows in splits.values():
        counts = Counter(label for row in rows for _, label in entities(row))
        assert set(counts) == set(ENTITY_TYPES)
        assert min(counts.values()) > 0.1 * counts.total()


def test_the_text_of_a_span_is_a_name_of_its_type(splits: Splits) -> None:
    known = {kind: set(pool.seen + pool.held_out) for kind, pool in demo_frames.NAMES.items()}
    known["place"].add("Amazon")
    known["organisation"].add("Amazon")
    first, last = (
        set(pool.seen + pool.held_out) for pool in (demo_frames.FIRST_NAMES, demo_frames.LAST_NAMES)
    )
    known["person"] = first | last | {f"{one} {other}" for one in first for other in last}
    lower = {kind: {name.lower() for name in names} for kind, names in known.items()}
    for row in (row for rows in splits.values() for row in rows):
        for text, label in entities(row):
            assert text in known[label] or (row.text.islower() and text in lower[label])


def test_spans_are_in_order_and_do_not_overlap(splits: Splits) -> None:
    for row in (row for rows in splits.values() for row in rows):
        spans = row.targets.get("entities", ())
        edges = [edge for span in spans if isinstance(span, Span) for edge in span[:2]]
        assert edges == sorted(edges)


def test_words_cover_all_but_space_and_are_cut_at_the_edges_of_spans(splits: Splits) -> None:
    for row in (row for rows in splits.values() for row in rows):
        if "entities" not in row.targets:
            assert row.words == ()
            continue
        words = [row.text[start:end] for start, end in row.words]
        assert "".join(words) == "".join(row.text.split())
        assert all(words)
        starts = {start for start, _ in row.words}
        ends = {end for _, end in row.words}
        for span in row.targets["entities"]:
            assert isinstance(span, Span)
            assert span.start in starts
            assert span.end in ends


def test_a_full_stop_after_a_name_is_a_word_of_its_own() -> None:
    rows = [row for rows in demo_corpus().values() for row in rows if "entities" in row.targets]
    row = next(row for row in rows if re.search(r" in Paris\.$", row.text))
    assert [row.text[start:end] for start, end in row.words][-2:] == ["Paris", "."]


def test_at_least_half_of_the_names_in_test_are_new(splits: Splits) -> None:
    known = joined(splits["train"] + splits["validation"])
    names = {name.casefold() for row in splits["test"] for name, _ in entities(row)}
    new = {name for name in names if not occurs(name, known)}
    assert len(new) >= 0.5 * len(names)


def test_at_least_a_third_of_the_opinion_phrases_in_test_are_new(splits: Splits) -> None:
    known, test = joined(splits["train"] + splits["validation"]), joined(splits["test"])
    phrases = [phrase for pool in opinion_pools() for phrase in pool.seen + pool.held_out]
    present = [phrase for phrase in phrases if occurs(phrase, test)]
    new = [phrase for phrase in present if not occurs(phrase, known)]
    assert len(present) > 100
    assert len(new) >= len(present) / 3


def test_held_out_names_and_phrases_stay_out_of_train_and_validation(splits: Splits) -> None:
    known = joined(splits["train"] + splits["validation"])
    names = [demo_frames.FIRST_NAMES, demo_frames.LAST_NAMES, *demo_frames.NAMES.values()]
    held_out = [text for pool in (*names, *opinion_pools()) for text in pool.held_out]
    assert [text for text in held_out if occurs(text, known)] == []


def test_some_names_are_of_two_types_in_train_and_in_test(splits: Splits) -> None:
    for split in ("train", "test"):
        types: dict[str, set[str]] = {}
        for row in splits[split]:
            for name, label in entities(row):
                types.setdefault(name.casefold(), set()).add(label)
        assert sum(len(labels) > 1 for labels in types.values()) >= 3


def test_texts_vary_in_length_case_and_alphabet(splits: Splits) -> None:
    texts = [row.text for row in splits["train"]]
    lengths = sorted(len(text.split()) for text in texts)
    assert lengths[0] <= 6
    assert lengths[-1] >= 25
    assert 0.05 < sum(text.islower() for text in texts) / len(texts) < 0.25
    assert sum(not text.isascii() for text in texts) > 0.1 * len(texts)


def test_no_slot_is_left_unfilled(splits: Splits) -> None:
    assert not re.search(
        r"[\[\]{}|]|\s\s|\s[.,!?]", joined(row for rows in splits.values() for row in rows)
    )


@pytest.mark.parametrize("sentiment", ["negative", "positive"])
def test_praise_and_blame_both_occur_under_either_sentiment(sentiment: str) -> None:
    """Negation and contrast: the words alone do not tell."""
    texts = joined(
        row for row in demo_corpus()["train"] if row.targets.get("sentiment") == sentiment
    )
    for word in ("delicious", "awful", "boring", "gripping"):
        assert occurs(word, texts)


def test_another_seed_gives_another_corpus() -> None:
    assert demo_corpus(1)["train"] != demo_corpus(2)["train"]


def test_the_same_seed_gives_the_same_corpus_in_every_process() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1
