"""Tag schemes, with seqeval as the oracle for what each scheme's tags mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, Entities

from mtl_core.data.examples import Span
from mtl_core.data.tags import check_scheme, spans_to_tags, tags_to_spans, to_bio2
from mtl_core.errors import DataError

ENTITIES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from(["PER", "creative-work"])),
    max_size=6,
)
"""(words before the entity, words in it, type) for each entity of a sentence."""


def spelled(entities: list[tuple[int, int, str]], scheme: str) -> list[str]:
    """A sentence's tags in a scheme, written from the scheme's definition."""
    tags: list[str] = []
    previous = "O"
    for gap, length, label in entities:
        tags += ["O"] * gap
        previous = "O" if gap else previous
        first, last, single = {"BIOES": ("B", "E", "S"), "BILOU": ("B", "L", "U")}.get(
            scheme, ("B", "I", "B")
        )
        if scheme == "IOB1" and previous != label:
            first, single = "I", "I"
        middle = ["I"] * (length - 2)
        prefixes = [single] if length == 1 else [first, *middle, last]
        tags += [f"{prefix}-{label}" for prefix in prefixes]
        previous = label
    return tags


def word_spans(num_words: int) -> list[tuple[int, int]]:
    return [(2 * index, 2 * index + 1) for index in range(num_words)]


@pytest.mark.parametrize("scheme", ["BIO2", "IOB1", "BIOES", "BILOU"])
@given(entities=ENTITIES)
def test_every_scheme_reads_as_the_same_bio2(
    scheme: str, entities: list[tuple[int, int, str]]
) -> None:
    assert to_bio2(spelled(entities, scheme)) == spelled(entities, "BIO2")


@pytest.mark.parametrize(
    ("scheme", "strict"), [("BIO2", IOB2), ("IOB1", IOB1), ("BIOES", IOBES), ("BILOU", BILOU)]
)
@given(entities=ENTITIES)
def test_well_formed_tags_give_the_entities_that_seqeval_sees(
    scheme: str, strict: type, entities: list[tuple[int, int, str]]
) -> None:
    tags = spelled(entities, scheme)
    (expected,) = Entities([tags], scheme=strict).entities
    spans = tags_to_spans(word_spans(len(tags)), to_bio2(tags))
    assert spans == tuple(Span(2 * e.start, 2 * e.end - 1, e.tag) for e in expected)


@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), max_size=12))
def test_malformed_bio2_reads_as_seqeval_does_by_default(tags: list[str]) -> None:
    spans = tags_to_spans(word_spans(len(tags)), tags)
    assert [(label, start // 2, end // 2) for start, end, label in spans] == get_entities(tags)


@given(entities=ENTITIES)
def test_spans_and_tags_round_trip(entities: list[tuple[int, int, str]]) -> None:
    tags = spelled(entities, "BIO2")
    words = word_spans(len(tags))
    assert spans_to_tags(words, tags_to_spans(words, tags)) == tags


@pytest.mark.parametrize("tag", ["PER", "X-PER", "B", "B-", "", "b-PER", "BI-PER"])
def test_a_tag_of_no_scheme_is_named(tag: str) -> None:
    with pytest.raises(DataError, match=f"tag '{tag}' belongs to no scheme"):
        to_bio2(["O", tag])


def test_a_column_of_two_schemes_is_refused() -> None:
    check_scheme("ner", set("OBIES"))
    check_scheme("ner", set("OBILU"))
    with pytest.raises(DataError, match=r"mix BIOES .* with BILOU"):
        check_scheme("ner", set("BEU"))


def test_words_and_tags_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        tags_to_spans([(0, 1)], ["O", "O"])
