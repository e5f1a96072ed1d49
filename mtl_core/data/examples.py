"""What a row means once its file format is forgotten: a text, and whatever labels it has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half of a character, as an emoji that was cut leaves it: no tokenizer takes such text."""


class Span(NamedTuple):
    """An entity: characters [start, end) of the text, and its type."""

    start: int
    end: int
    label: str


Target: TypeAlias = str | tuple[str, ...] | tuple[Span, ...]
"""A label, a set of labels, or the entities: by the task's kind."""


def label_names(target: Target) -> set[str]:
    """The labels, or entity types, that a target holds."""
    if isinstance(target, str):
        return {target}
    return {item.label if isinstance(item, Span) else item for item in target}


@dataclass(frozen=True, slots=True)
class Example:
    """One text with the labels it carries; a task that is absent is unlabelled here.

    `words` are the character spans that tags were given for; entity scores are counted over them.
    """

    text: str
    targets: dict[str, Target]
    words: tuple[tuple[int, int], ...] = ()


def labels_in(task: str, examples: Iterable[Example]) -> set[str]:
    """The labels, or entity types, that a task has in examples."""
    names: set[str] = set()
    for example in examples:
        if task in example.targets:
            names |= label_names(example.targets[task])
    return names


@dataclass(frozen=True)
class Corpus:
    """All examples of an experiment by split, and what was left out while reading."""

    splits: dict[str, list[Example]]
    labels: dict[str, tuple[str, ...]]
    """Per task, labels that come first in the order, often none: those a source declares
    (ClassLabel), or all of its train split if the rows drawn no longer show each."""
    skipped: dict[str, int]
    """Unreadable rows that were skipped on request, per source."""
    notes: tuple[str, ...] = ()
    """What else to tell of what was left out."""
    carved: bool = False
    """Whether rows of train serve as validation."""
