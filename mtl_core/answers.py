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

from mtl_core.heads import Head, MultilabelHead, TokenClassificationHead
from mtl_core.windows import Offsets

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

    def select(self, rows: Sequence[int]) -> Features:
        """The features of some of the texts."""
        if len(rows) == len(self.lengths):
            return self
        ends = np.cumsum(self.lengths)
        spans = [np.arange(ends[row] - self.lengths[row], ends[row]) for row in rows]
        states = self.states[np.concatenate(spans)] if len(self.states) else self.states
        return Features(self.pooled[list(rows)], states, self.lengths[list(rows)])


@dataclass(frozen=True)
class SentenceOutput:
    """What a sentence head says of N texts."""

    labels: tuple[str, ...]
    scores: Float
    """(N, C) probabilities."""
    best: NDArray[np.int64] | None
    """(N,) class of the highest logit; None where any number of labels may hold."""
    threshold: float = 0.5

    def part(self, first: int, last: int) -> SentenceOutput:
        """What is said of the texts [first, last)."""
        best = None if self.best is None else self.best[first:last]
        return SentenceOutput(self.labels, self.scores[first:last], best, self.threshold)

    def predictions(self) -> Iterator[Classification | Multilabel]:
        names = self.labels
        for row, values in enumerate(self.scores):
            scores = {n: round(p, 6) for n, p in zip(names, values.tolist(), strict=True)}
            if self.best is None:
                likely = values >= self.threshold
                chosen = [name for name, yes in zip(names, likely, strict=True) if yes]
                yield {"labels": chosen, "scores": scores}
            else:
                label = names[int(self.best[row])]
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

    def entities(self, texts: Sequence[str], offsets: Sequence[Offsets]) -> Iterator[list[Entity]]:
        """Each text's entities, in order.

        Args:
            texts: N texts.
            offsets: for each, the characters its sub-words stand for.
        """
        tags, probabilities = self.tags.tolist(), self.probabilities.tolist()
        first = 0
        for text, ranges in zip(texts, offsets, strict=True):
            last = first + len(ranges)
            yield [
                Entity(
                    entity_group=self.labels[tags[begin] - 1],
                    score=round(sum(probabilities[begin:end]) / (end - begin), 6),
                    word=text[ranges[begin - first][0] : ranges[end - 1 - first][1]],
                    start=ranges[begin - first][0],
                    end=ranges[end - 1 - first][1],
                )
                for begin, end in self._spans(tags, first, last)
            ]
            first = last

    def _spans(self, tags: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int]]:
        """Sub-words [begin, end) of each entity between `first` and `last`."""
        begin = -1
        for position in range(first, last):
            inside = tags[position] > len(self.labels)
            if begin >= 0 and not inside:
                yield begin, position
                begin = -1
            if 1 <= tags[position] <= len(self.labels):
                begin = position
        if begin >= 0:
            yield begin, last


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
    if not isinstance(head, TokenClassificationHead):
        if isinstance(head, MultilabelHead):
            return SentenceOutput(head.labels, scores, None, head.config.threshold)
        return SentenceOutput(head.labels, scores, logits.argmax(axis=-1))
    tags = head.decode_texts(logits, features.lengths)
    chosen = np.take_along_axis(scores, tags[:, None], axis=1)[:, 0]
    return TokenOutput(head.labels, tags, chosen, features.lengths, scores if all_tags else None)


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
