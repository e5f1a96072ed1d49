"""From a head's arrays to what a person reads: labels, entities.

Shapes: N texts, C classes, T sub-words of all texts one after another, K tags.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from mtl_core.config import TaskKind
from mtl_core.heads import Head
from mtl_core.metrics import tagged_spans
from mtl_core.windows import Tokenized

Float = NDArray[np.float32]


class Classification(TypedDict):
    """The best label, and the probability of every one."""

    label: str
    score: float
    scores: dict[str, float]


class Multilabel(TypedDict):
    """Labels at or above the threshold, and the probability of every one."""

    labels: list[str]
    scores: dict[str, float]


class Entity(TypedDict):
    """Characters [start, end) of the text as given; score is the mean probability of its tags."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


Prediction = Classification | Multilabel | list[Entity]


@dataclass(frozen=True)
class Features:
    """What heads read of N texts: vectors of the texts, and states of their sub-words."""

    pooled: Float
    """(N, H)."""
    states: NDArray[Any]
    """(T, H) without padding and special tokens; fp32 or fp16. Empty if no head wants them."""
    lengths: NDArray[np.int64]
    """(N,) sub-words of each text."""

    def select(self, rows: Sequence[int], level: str) -> Features:
        """Only what a head of this level reads of some of the texts."""
        nothing = np.zeros((0, 0), np.float32)
        if level == "sentence":
            return Features(self.pooled[list(rows)], nothing, np.zeros(0, np.int64))
        if len(rows) == len(self.lengths):
            return Features(nothing, self.states, self.lengths)
        ends = np.cumsum(self.lengths)
        spans = [np.arange(ends[row] - self.lengths[row], ends[row]) for row in rows]
        return Features(nothing, self.states[np.concatenate(spans)], self.lengths[list(rows)])


@dataclass(frozen=True)
class SentenceOutput:
    """What a sentence head says of N texts."""

    labels: tuple[str, ...]
    scores: Float
    """(N, C) probabilities."""
    decided: NDArray[Any]
    """(N,) class, or (N, C) whether each label is given."""

    def part(self, first: int, last: int) -> SentenceOutput:
        """What is said of the texts [first, last)."""
        return SentenceOutput(self.labels, self.scores[first:last], self.decided[first:last])

    def predictions(self, items: Sequence[Tokenized]) -> Iterator[Classification | Multilabel]:
        """Each text's label or labels."""
        names = self.labels
        for _, values, decided in zip(items, self.scores.tolist(), self.decided, strict=True):
            scores = {name: round(p, 6) for name, p in zip(names, values, strict=True)}
            if decided.ndim:
                given = [name for name, yes in zip(names, decided, strict=True) if yes]
                yield {"labels": given, "scores": scores}
            else:
                label = names[decided]
                yield {"label": label, "score": scores[label], "scores": scores}


@dataclass(frozen=True)
class TokenOutput:
    """What a token head says of the sub-words of N texts."""

    labels: tuple[str, ...]
    """Entity types; tags are O, a B- for each, an I- for each."""
    tags: NDArray[np.int64]
    """(T,) a legal BIO2 sequence for each text."""
    probabilities: Float
    """(T,) of those tags."""
    lengths: NDArray[np.int64]
    """(N,) sub-words of each text."""
    scores: Float | None = None
    """(T, K) probabilities of all tags, when asked for."""

    def part(self, first: int, last: int) -> TokenOutput:
        """What is said of the texts [first, last)."""
        begin, end = int(self.lengths[:first].sum()), int(self.lengths[:last].sum())
        return TokenOutput(
            self.labels,
            self.tags[begin:end],
            self.probabilities[begin:end],
            self.lengths[first:last],
            None if self.scores is None else self.scores[begin:end],
        )

    def predictions(self, items: Sequence[Tokenized]) -> Iterator[list[Entity]]:
        """Each text's entities, in order."""
        tags, probabilities = self.tags.tolist(), self.probabilities.tolist()
        first = 0
        for item in items:
            ranges = item.placed[0]
            last = first + len(ranges)
            found = []
            for kind, begin, end in tagged_spans(tags[first:last], len(self.labels)):
                start, stop = ranges[begin][0], ranges[end - 1][1]
                score = sum(probabilities[first + begin : first + end]) / (end - begin)
                found.append(
                    Entity(
                        entity_group=self.labels[kind],
                        score=round(score, 6),
                        word=item.text[start:stop],
                        start=start,
                        end=stop,
                    )
                )
            yield found
            first = last


Output = SentenceOutput | TokenOutput


@torch.inference_mode()
def run_head(head: Head, features: Features, all_tags: bool = False) -> Output:
    """What a head says of texts whose encoding is done.

    Args:
        head: in eval mode, on any device.
        features: of N texts.
        all_tags: give the probability of every tag, not only of the chosen ones.
    """
    source = features.pooled if head.level == "sentence" else features.states
    device = head.output.weight.device
    rows = torch.from_numpy(np.ascontiguousarray(source)).to(device, torch.float32)
    logits: Float = head(rows).cpu().numpy()
    scores = head.scores(logits)
    decided = head.decide(logits, features.lengths)
    if head.level == "sentence":
        return SentenceOutput(head.labels, scores, decided)
    chosen = np.take_along_axis(scores, decided[:, None], axis=1)[:, 0]
    every = scores if all_tags else None
    return TokenOutput(head.labels, decided, chosen, features.lengths, every)


def flatten(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """One text's answers as columns for a table: label and score, or entities."""
    columns: dict[str, Any] = {}
    for task, answer in prediction.items():
        if isinstance(answer, list):
            columns[task] = answer
        elif "labels" in answer:
            columns[task] = answer["labels"]
        else:
            columns[task] = answer["label"]
            columns[f"{task}_score"] = answer["score"]
    return columns


def flat_types(kinds: Mapping[str, TaskKind]) -> dict[str, Any]:
    """The Arrow types of the columns that `flatten` makes for tasks of these kinds."""
    import pyarrow as pa

    text, score, place = pa.string(), pa.float64(), pa.int64()
    entity = pa.struct(
        {"entity_group": text, "score": score, "word": text, "start": place, "end": place}
    )
    columns: dict[str, Any] = {}
    for task, kind in kinds.items():
        if kind == "classification":
            columns |= {task: text, f"{task}_score": score}
        else:
            columns[task] = pa.list_(text if kind == "multilabel" else entity)
    return columns
