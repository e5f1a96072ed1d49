"""One row of a table becomes an Example: words are found in the text, labels in their columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mtl_core.config import TaskKind
from mtl_core.data.examples import LONE_SURROGATE, Example, Span, Target
from mtl_core.data.formats import BadRow, Column, Row
from mtl_core.data.tags import check_scheme, tags_to_spans, to_bio2
from mtl_core.errors import DataError

Word = tuple[int, int]


@dataclass
class RowReader:
    """Reads the rows of one source."""

    columns: Mapping[str, Column]
    """Where `text`, `words` and each task stand."""
    kinds: Mapping[str, TaskKind]
    prefixes: dict[str, set[str]] = field(default_factory=dict)
    """Those of the tags read so far, by task: a scheme shows in a column, not in a row."""

    def read(self, row: Row) -> Example:
        """The row's text with the labels it carries.

        A missing value (no key, null, NaN, an empty string) leaves the row unlabelled for that
        task; an empty list says that there are no labels or, without words, no entities.

        Raises:
            BadRow: blank text, tags and words of unequal number, words or entities off the text.
            DataError: a value of the wrong type, an unknown tag.
        """
        text, words = self._text_and_words(row)
        targets: dict[str, Target] = {}
        edges: set[int] = set()
        tags: dict[str, list[str]] = {}
        for task, kind in self.kinds.items():
            value = row.get(self.columns[task])
            if _is_missing(value):
                continue
            try:
                if kind == "classification":
                    targets[task] = _label(value)
                elif kind == "multilabel":
                    targets[task] = _labels(value)
                elif _are_entities(items := _items(value, None), words):
                    targets[task] = spans = _entities(items, text)
                    edges.update(edge for span in spans for edge in span[:2])
                else:
                    targets[task], tags[task] = _tagged(items, words), items
            except DataError as error:
                raise type(error)(f"{task}: {error}") from error
        for task, items in tags.items():
            prefixes = self.prefixes.setdefault(task, set())
            prefixes.update(tag[0] for tag in items)
            check_scheme(task, prefixes)
        found = [word for word in words or () if word]
        if words is None and any(self.kinds[task] == "token_classification" for task in targets):
            found = _split(text)
        return Example(text, targets, tuple(_cut(text, found, edges) if edges else found))

    def _text_and_words(self, row: Row) -> tuple[str, list[Word | None] | None]:
        text = row.get(self.columns["text"]) if "text" in self.columns else None
        words = row.get(self.columns["words"]) if "words" in self.columns else None
        if not (_is_missing(text) or isinstance(text, str)):
            raise DataError(f"text: expected a string, got {_show(text)}")
        items = None if _is_missing(words) else _items(words, None)
        wrong = [item for item in items or () if not isinstance(item, str)]
        if wrong:
            raise DataError(f"words: expected strings, got {_show(wrong[0])}")
        text = " ".join(items or ()) if _is_missing(text) else str(text)
        if not text.strip():
            raise BadRow("the text is empty or only spaces")
        if LONE_SURROGATE.search(text):
            raise BadRow("the text is no valid Unicode: it holds half a character")
        return text, None if items is None else align(text, items)


def align(text: str, words: Sequence[str]) -> list[Word | None]:
    """Where each word stands in the text; spacing may differ. A word of only spaces is None.

    Raises:
        BadRow: the text is not made of these words, in this order.
    """
    solid = [index for index, character in enumerate(text) if not character.isspace()]
    spans: list[Word | None] = []
    used = 0
    for number, word in enumerate(words, start=1):
        letters = "".join(word.split())
        where = solid[used : used + len(letters)]
        if "".join(text[index] for index in where) != letters:
            rest = text[where[0] :][:20] if where else ""
            raise BadRow(
                f"word {number} is {word!r} where the text has {rest!r}; "
                "without `text` in columns the words alone make the text"
            )
        spans.append((where[0], where[-1] + 1) if where else None)
        used += len(letters)
    if used < len(solid):
        raise BadRow(f"no words for the text from character {solid[used]} on")
    return spans


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _show(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown[:40] + '…' if len(shown) > 40 else shown}"


def _items(value: Any, separator: str | None) -> list[Any]:
    """A list as it is, or the one a cell holds: JSON, or items between separators."""
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str):
        raise DataError(f"expected a list, got {_show(value)}")
    cell = value.strip()
    if cell.startswith("[") and cell.endswith("]"):
        try:
            return list(json.loads(cell))
        except json.JSONDecodeError as error:
            if cell[1] in "'\"":
                raise DataError(f'{_show(cell)} is no JSON list; write ["a", "b"]') from error
    return [item.strip() for item in cell.split(separator) if item.strip()]


def _label(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        hint = "; several labels a text need kind: multilabel" if isinstance(value, list) else ""
        raise DataError(f"expected a label, a string or a whole number, got {_show(value)}{hint}")
    return str(value).strip()


def _labels(value: Any) -> tuple[str, ...]:
    items = _items(value, "|") if isinstance(value, str | list | tuple) else [value]
    labels = dict.fromkeys(_label(item) for item in items)
    if len(labels) < len(items) and not all(isinstance(item, str) for item in items):
        raise DataError(f"{_show(value)} looks like a multi-hot vector; give the labels' names")
    return tuple(labels)


def _are_entities(items: list[Any], words: list[Word | None] | None) -> bool:
    """Whether a token task's value lists entities, not tags; without words `[]` is no entities."""
    return isinstance(items[0], dict) if items else words is None


def _tagged(tags: list[Any], words: list[Word | None] | None) -> tuple[Span, ...]:
    wrong = [tag for tag in tags if not isinstance(tag, str)]
    if wrong:
        raise DataError(f"expected tags by name, such as B-person, got {_show(wrong[0])}")
    if words is None:
        raise BadRow("tags without words; name their column: `words: <column>`")
    if len(tags) != len(words):
        hint = "" if tags else " (lists of entities need a source without `words`)"
        raise BadRow(f"{len(tags)} tags for {len(words)} words{hint}")
    pairs = list(zip(words, to_bio2(tags), strict=True))
    lost = next((tag for word, tag in pairs if word is None and tag.startswith("B-")), None)
    if lost is not None:
        raise BadRow(f"a word of only spaces is tagged {lost}")
    kept = [(word, tag) for word, tag in pairs if word is not None]
    return tags_to_spans([word for word, _ in kept], [tag for _, tag in kept])


def _entities(items: list[Any], text: str) -> tuple[Span, ...]:
    spans = sorted({_entity(item, text) for item in items})
    for one, other in pairwise(spans):
        if other.start < one.end:
            raise BadRow(f"entities overlap: {tuple(one)} and {tuple(other)}; keep one of them")
    return tuple(spans)


def _entity(item: Any, text: str) -> Span:
    try:
        start, end, label = item["start"], item["end"], item["label"]
    except (TypeError, KeyError) as error:
        raise DataError(f"expected {{start, end, label}}, got {_show(item)}") from error
    if type(start) is not int or type(end) is not int or not isinstance(label, str):
        raise DataError(f"expected whole numbers and a label, got {_show(item)}")
    if not 0 <= start < end <= len(text) or not text[start:end].strip():
        raise BadRow(f"{item} marks nothing in a text of {len(text)} characters")
    return Span(start, end, _label(label))


def _split(text: str) -> list[Word]:
    return [word for word in align(text, text.split()) if word]


def _cut(text: str, words: Sequence[Word], edges: set[int]) -> list[Word]:
    """The words, cut where an entity starts or ends inside one."""
    pieces = []
    for start, end in words:
        points = [start, *sorted(edge for edge in edges if start < edge < end), end]
        pieces += [(a, b) for a, b in pairwise(points) if text[a:b].strip()]
    return pieces
