"""Entity tags over words (BIO2, IOB1, BIOES/IOBES, BILOU) and the character spans they mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from mtl_core.data.examples import DataError, Span

Scheme = Literal["BIO2", "IOB1", "BIOES", "BILOU"]


def tag_names(entity_types: Sequence[str]) -> tuple[str, ...]:
    """O, B-x…, I-x…: the order of a token head's outputs."""
    return ("O", *(f"B-{t}" for t in entity_types), *(f"I-{t}" for t in entity_types))


def split_tag(tag: str) -> tuple[str, str]:
    """`B-person` → ("B", "person"); `O` → ("O", "").

    Raises:
        DataError: the tag belongs to no scheme.
    """
    if tag == "O":
        return "O", ""
    prefix, _, label = tag.partition("-")
    if len(prefix) != 1 or prefix not in "BIESLU" or not label:
        raise DataError(
            f"tag {tag!r} belongs to no scheme (BIO2, IOB1, BIOES, BILOU); "
            "tags are O or a prefix and a type, such as B-person"
        )
    return prefix, label


def detect_scheme(rows: Iterable[Sequence[str]]) -> Scheme:
    """The scheme of a whole column of tags.

    E- or S- make it BIOES, L- or U- make it BILOU. IOB1 is where an I- starts an entity and B-
    stands only directly after an entity of the same type. Everything else is BIO2, also a mixed
    column in which some entities start with a stray I-.

    Raises:
        DataError: a tag of no scheme, or prefixes of BIOES and BILOU in one column.
    """
    prefixes: set[str] = set()
    inside_starts, begin_starts = False, False
    for tags in rows:
        previous = ""
        for tag in tags:
            prefix, label = split_tag(tag)
            prefixes.add(prefix)
            inside_starts |= prefix == "I" and label != previous
            begin_starts |= prefix == "B" and label != previous
            previous = label
    if prefixes & set("ES") and prefixes & set("LU"):
        raise DataError("tags mix BIOES (E-, S-) with BILOU (L-, U-); convert them to one scheme")
    if prefixes & set("ES"):
        return "BIOES"
    if prefixes & set("LU"):
        return "BILOU"
    return "IOB1" if inside_starts and not begin_starts else "BIO2"


def to_bio2(tags: Sequence[str]) -> list[str]:
    """One sentence's tags in BIO2, from any of the schemes.

    One rule reads them all, because their prefixes never contradict each other: B, S and U start
    an entity, E, L, S and U end one, and a tag whose type differs from the entity before it starts
    one as well. The last part reads IOB1, and makes a stray I- in BIO2 a start, which is what
    conlleval and seqeval's default mode do.

    Raises:
        DataError: a tag of no scheme.
    """
    converted = []
    running = ""
    for tag in tags:
        prefix, label = split_tag(tag)
        starts = prefix in "BSU" or label != running
        converted.append("O" if prefix == "O" else f"{'B' if starts else 'I'}-{label}")
        running = "" if prefix in "OELSU" else label
    return converted


def tags_to_spans(words: Sequence[tuple[int, int]], tags: Sequence[str]) -> tuple[Span, ...]:
    """The entities that BIO2 tags mark; a stray I- starts one (see `to_bio2`).

    Args:
        words: character spans [start, end), in order.
        tags: one a word.
    """
    spans: list[Span] = []
    for (start, end), tag in zip(words, to_bio2(tags), strict=True):
        prefix, label = split_tag(tag)
        if prefix == "B":
            spans.append(Span(start, end, label))
        elif prefix == "I":
            spans[-1] = spans[-1]._replace(end=end)
    return tuple(spans)


def spans_to_tags(words: Sequence[tuple[int, int]], spans: Iterable[Span]) -> list[str]:
    """BIO2 tags, one a word: a word is tagged with the first span that it overlaps.

    Args:
        words: character spans [start, end), in order, not overlapping.
        spans: entities in any order.
    """
    tags = []
    waiting = sorted(spans)
    begun = -1
    index = 0
    for start, end in words:
        while index < len(waiting) and waiting[index].end <= start:
            index += 1
        if index < len(waiting) and waiting[index].start < end:
            tags.append(f"{'I' if begun == index else 'B'}-{waiting[index].label}")
            begun = index
        else:
            tags.append("O")
    return tags
