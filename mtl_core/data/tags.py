"""Entity tags over words (BIO2, IOB1, BIOES/IOBES, BILOU) and the character spans they mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from mtl_core.data.examples import Span
from mtl_core.errors import DataError


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


def check_scheme(task: str, prefixes: Set[str]) -> None:
    """Raise DataError if a column's tags are of BIOES and BILOU; all else reads as one scheme."""
    if prefixes & set("ES") and prefixes & set("LU"):
        problem = "the column's tags mix BIOES (E-, S-) with BILOU (L-, U-)"
        raise DataError(f"{task}: {problem}; convert them to one scheme")


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


def spans_to_tags(pieces: Sequence[tuple[int, int]], spans: Iterable[Span]) -> list[str]:
    """BIO2 tags of character ranges: a piece belongs to the span that its first character is in.

    Args:
        pieces: words or sub-words [start, end), in order; an empty one is outside.
        spans: entities in any order.
    """
    tags, current = [], None
    ordered = sorted(spans)
    for start, end in pieces:
        if start == end:
            tags.append("O")
            continue
        inside = next((span for span in ordered if span.start <= start < span.end), None)
        if inside is None:
            tags.append("O")
        else:
            tags.append(("I-" if inside == current else "B-") + inside.label)
        current = inside
    return tags
