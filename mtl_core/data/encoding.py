"""From examples to arrays: text and spans become sub-word ids and targets.

A split is a handful of flat arrays with row offsets, so that it can be mapped from disk
(`mtl_core.data.cache`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl_core.config import TaskConfig
from mtl_core.data.examples import Corpus, Example, Span, labels_in
from mtl_core.data.tags import spans_to_tags, tag_names
from mtl_core.errors import DataError

IGNORE = -100
TEXTS_AT_ONCE = 1024
Labels = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class EncodedSplit:
    """N texts as arrays; row i owns [starts[i], starts[i+1]) of every flat array."""

    input_ids: NDArray[np.int32]
    """(all tokens,) sub-word ids, special tokens included."""
    starts: NDArray[np.int64]
    """(N+1,)"""
    targets: dict[str, NDArray[np.int32]]
    """classification (N,), multilabel (N, C), token classification (all tokens,); IGNORE where a
    row is unlabelled or a token stands for no text."""
    present: dict[str, NDArray[np.bool_]]
    """task → (N,) whether the row carries its label."""
    word_tokens: NDArray[np.int32]
    """(all words,) each word's first sub-word within its row, -1 when truncation lost it."""
    word_starts: NDArray[np.int64]
    """(N+1,)"""
    word_tags: dict[str, NDArray[np.int32]]
    """task → (all words,) gold BIO2 tag ids, IGNORE in rows without the label."""
    num_truncated: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        lengths: NDArray[np.int64] = self.starts[1:] - self.starts[:-1]
        return lengths

    def label_counts(self, task: str) -> NDArray[np.int64]:
        """(N,) how many labelled items each row adds to a task's loss."""
        target = self.targets[task]
        if task in self.word_tags:
            ends = np.concatenate([[0], np.cumsum(target != IGNORE)])
            counts: NDArray[np.int64] = ends[self.starts[1:]] - ends[self.starts[:-1]]
            return counts
        return self.present[task].astype(np.int64)

    def output_counts(self, task: str, num_outputs: int) -> NDArray[np.int64]:
        """(num_outputs,) how often each label or tag is true."""
        target = self.targets[task]
        if target.ndim == 2:
            sums: NDArray[np.int64] = target[self.present[task]].sum(axis=0, dtype=np.int64)
            return sums
        return np.bincount(target[target != IGNORE], minlength=num_outputs)


def resolve_labels(corpus: Corpus, tasks: Mapping[str, TaskConfig]) -> dict[str, tuple[str, ...]]:
    """The label names of each task: as configured, or those sources declare and train has.

    Raises:
        DataError: a task without labels in train, or a label elsewhere that is not among them.
    """
    labels = {}
    for task, config in tasks.items():
        in_train = labels_in(task, corpus.splits["train"])
        if not in_train:
            raise DataError(f"task {task!r} has no label in train: check its column in `data`")
        declared = corpus.labels.get(task, ())
        labels[task] = config.labels or tuple(dict.fromkeys((*declared, *sorted(in_train))))
    check_labels(corpus, tasks, labels)
    return labels


def check_labels(corpus: Corpus, tasks: Mapping[str, TaskConfig], labels: Labels) -> None:
    """Raise DataError for the first label in a corpus that is not among its task's."""
    for split, examples in corpus.splits.items():
        for task, config in tasks.items():
            unknown = sorted(labels_in(task, examples) - set(labels[task]))
            if unknown:
                where = next(e.text for e in examples if unknown[0] in labels_in(task, [e]))
                what, fix = "never occurs in train", f"list all labels in tasks.{task}.labels"
                if config.labels:
                    what, fix = "is not a known one", f"known are {', '.join(labels[task][:20])}"
                raise DataError(
                    f"{split}: label {unknown[0]!r} of task {task!r} {what} "
                    f"(in {where[:60]!r}); mend the row, or: {fix}"
                )


def encode_split(
    examples: Sequence[Example],
    tasks: Mapping[str, TaskConfig],
    labels: Labels,
    tokenizer: Any,
    max_length: int,
) -> EncodedSplit:
    """Tokenise and label; texts longer than `max_length` tokens are cut and counted."""
    builder = _Builder(tasks, labels)
    for first in range(0, len(examples), TEXTS_AT_ONCE):
        chunk = examples[first : first + TEXTS_AT_ONCE]
        texts = [example.text for example in chunk]
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_overflowing_tokens=False,
        )
        for row, example in enumerate(chunk):
            offsets = token_offsets(example.text, encoded["offset_mapping"][row])
            builder.add(example, encoded["input_ids"][row], offsets)
            builder.num_truncated += bool(encoded.encodings[row].overflowing)
    return builder.build()


def token_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The characters each sub-word stands for: ranges in order that never overlap.

    Spaces that some tokenizers count in are left out. A character that is cut into pieces (the
    bytes of an emoji) belongs to the first of them; accents and joiners that a tokenizer drops
    belong to the piece they follow. Special tokens, and pieces to which no character is left,
    come out empty (start == end).
    """
    ranges, used = [], 0
    for start, end in offsets:
        start = max(start, used)
        while start < end and text[start].isspace():
            start += 1
        end = max(start, end)
        ranges.append((start, end))
        used = end if start < end else used
    following = len(text)
    for place in range(len(ranges) - 1, -1, -1):
        start, end = ranges[place]
        if start < end:
            while end < following and _is_mark(text[end]):
                end += 1
            ranges[place] = (start, end)
            following = start
    return ranges


def _is_mark(character: str) -> bool:
    """Whether a character only modifies the one before it: a combining, format or control one."""
    return unicodedata.category(character) in ("Mn", "Me", "Cf", "Cc") and not character.isspace()


class _Builder:
    """Collects rows and turns them into arrays."""

    def __init__(self, tasks: Mapping[str, TaskConfig], labels: Labels) -> None:
        self.tasks = tasks
        self.index = {task: {name: i for i, name in enumerate(labels[task])} for task in tasks}
        self.tags = {
            task: {tag: i for i, tag in enumerate(tag_names(labels[task]))} for task in tasks
        }
        self.input_ids: list[int] = []
        self.starts = [0]
        self.targets: dict[str, list[Any]] = {task: [] for task in tasks}
        self.present: dict[str, list[bool]] = {task: [] for task in tasks}
        self.word_tokens: list[int] = []
        self.word_starts = [0]
        self.word_tags: dict[str, list[int]] = {
            task: [] for task, config in tasks.items() if config.kind == "token_classification"
        }
        self.num_truncated = 0

    def add(self, example: Example, ids: Sequence[int], offsets: list[tuple[int, int]]) -> None:
        self.input_ids.extend(ids)
        self.starts.append(len(self.input_ids))
        if self.word_tags:
            self.word_tokens.extend(_first_tokens(example.words, offsets))
            self.word_starts.append(len(self.word_tokens))
        for task, config in self.tasks.items():
            target = example.targets.get(task)
            self.present[task].append(target is not None)
            if config.kind == "classification":
                index = self.index[task]
                self.targets[task].append(index[target] if isinstance(target, str) else IGNORE)
            elif config.kind == "multilabel":
                self.targets[task].append(_multi_hot(target, self.index[task]))
            elif target is None:
                self.targets[task].extend([IGNORE] * len(ids))
                self.word_tags[task].extend([IGNORE] * len(example.words))
            else:
                spans = [span for span in target if isinstance(span, Span)]
                tags = self.tags[task]
                pieces = zip(offsets, spans_to_tags(offsets, spans), strict=True)
                self.targets[task].extend(
                    IGNORE if start == end else tags[tag] for (start, end), tag in pieces
                )
                self.word_tags[task].extend(tags[t] for t in spans_to_tags(example.words, spans))

    def build(self) -> EncodedSplit:
        return EncodedSplit(
            np.array(self.input_ids, dtype=np.int32),
            np.array(self.starts, dtype=np.int64),
            {task: np.array(values, dtype=np.int32) for task, values in self.targets.items()},
            {task: np.array(values, dtype=np.bool_) for task, values in self.present.items()},
            np.array(self.word_tokens, dtype=np.int32),
            np.array(self.word_starts, dtype=np.int64),
            {task: np.array(values, dtype=np.int32) for task, values in self.word_tags.items()},
            self.num_truncated,
        )


def _multi_hot(target: Any, index: Mapping[str, int]) -> list[int]:
    if target is None:
        return [IGNORE] * len(index)
    row = [0] * len(index)
    for name in target:
        row[index[name]] = 1
    return row


def _first_tokens(
    words: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]
) -> list[int]:
    """For each word, the first sub-word that begins in it, else the first that touches it, or -1.

    A sub-word may begin in one word and end in the next where no space parts them.
    """
    solid = [(place, span) for place, span in enumerate(offsets) if span[0] < span[1]]
    tokens, index = [], 0
    for start, end in words:
        while index < len(solid) and solid[index][1][1] <= start:
            index += 1
        touching = [place for place, span in solid[index : index + 1] if span[0] < end]
        beginning = [p for p, span in solid[index : index + 2] if start <= span[0] < end]
        tokens.append((beginning or touching or [-1])[0])
    return tokens
