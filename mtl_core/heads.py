"""What reads the encoder's output for one task, and what it learns from.

Shapes: B texts, L tokens, H hidden units, C classes, N labelled items (texts or tokens),
T tags: O, then a B- tag for each of E entity types, then an I- tag for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mtl_core.config import TaskConfig, TaskKind
from mtl_core.data.tags import tag_names

Level = Literal["sentence", "token"]


class Head(nn.Module):
    """Dropout, an optional hidden layer, and a linear layer.

    A head is fed only the items that carry its label. With none it returns an empty sum, so all
    its parameters still get a gradient (zero) on every rank of a data-parallel run.
    """

    kind: ClassVar[TaskKind]
    level: ClassVar[Level]

    def __init__(self, hidden_size: int, labels: Sequence[str], config: TaskConfig) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.config = config
        self.hidden_size = hidden_size
        self.dropout = nn.Dropout(config.dropout)
        width = config.hidden_size or hidden_size
        self.hidden = nn.Linear(hidden_size, width) if config.hidden_size else None
        self.output = nn.Linear(width, self.num_outputs)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)
        self.register_buffer("label_weights", None, persistent=False)

    @property
    def num_outputs(self) -> int:
        return len(self.labels)

    def forward(self, features: Tensor) -> Tensor:
        """(…, H) features → (…, num_outputs) logits in fp32."""
        features = self.dropout(features)
        if self.hidden is not None:
            features = self.dropout(F.gelu(self.hidden(features)))
        return self.output(features).float()  # type: ignore[no-any-return]

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(N, num_outputs) logits, (N,) int64 targets → () sum of N cross entropies."""
        smoothing = self.config.label_smoothing
        return F.cross_entropy(
            logits, targets, weight=self.label_weights, reduction="sum", label_smoothing=smoothing
        )

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, num_outputs) logits → probabilities of the same shape."""
        return softmax(logits)

    def decide(self, logits: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[Any]:
        """(N, num_outputs) logits → (N,) ids of classes, or of tags for texts of these lengths."""
        likeliest: NDArray[np.int64] = logits.argmax(axis=-1)
        return likeliest

    def set_label_counts(self, counts: NDArray[np.int64]) -> None:
        """Turn `class_weights` into factors, given how often each output occurs in train.

        Args:
            counts: (num_outputs,).
        """
        weights = self.config.class_weights
        if weights is None:
            return
        if weights == "balanced":
            # scikit-learn's rule: n / (number of classes that occur · count). One that does not
            # still counts in a sigmoid's loss or a smoothed one, and nothing says how much: 1.
            factors = counts.sum() / np.maximum(np.count_nonzero(counts) * counts, 1)
            factors[counts == 0] = 1.0
        else:
            factors = np.array([self._factor(weights, name) for name in self.output_names])
        device = self.output.weight.device
        self.label_weights = torch.tensor(factors, dtype=torch.float32, device=device)

    def _factor(self, weights: Mapping[str, float], output: str) -> float:
        return weights.get(output, 1.0)

    @property
    def output_names(self) -> tuple[str, ...]:
        return self.labels

    def fits(self, other: Head) -> bool:
        """Whether the other head can take over this one's weights."""
        mine = [tuple(t.shape) for t in self.state_dict().values()]
        return self.kind == other.kind and mine == [
            tuple(t.shape) for t in other.state_dict().values()
        ]

    def describe(self) -> dict[str, Any]:
        """What head.json holds: enough to build this head again without the transformer."""
        return {
            "kind": self.kind,
            "labels": list(self.labels),
            "hidden_size": self.hidden_size,
            "config": self.config.model_dump(mode="json", exclude={"labels"}),
        }


class ClassificationHead(Head):
    """One label a text."""

    kind = "classification"
    level = "sentence"


class MultilabelHead(Head):
    """Any number of labels a text, each on its own."""

    kind = "multilabel"
    level = "sentence"

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy, averaged over labels; targets (N, C) of 0 and 1."""
        smoothing = self.config.label_smoothing
        wanted = targets.float() * (1 - smoothing) + smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        if self.label_weights is not None:
            losses = losses * self.label_weights
        return losses.sum() / max(len(self.labels), 1)

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, C) logits → probabilities."""
        # A sigmoid; this form of it never overflows.
        probabilities: NDArray[np.float32] = (0.5 + 0.5 * np.tanh(0.5 * logits)).astype(np.float32)
        return probabilities

    def decide(self, logits: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[Any]:
        """(N, C) logits → (N, C) whether each label is given."""
        return self.scores(logits) >= self.config.threshold


class TokenClassificationHead(Head):
    """Entities as BIO2 tags of sub-words; `labels` are the entity types."""

    kind = "token_classification"
    level = "token"

    @property
    def num_outputs(self) -> int:
        return 1 + 2 * len(self.labels)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tag_names(self.labels)

    def _factor(self, weights: Mapping[str, float], output: str) -> float:
        """A class weight may name an entity type; it then counts for its B- and I- tags."""
        return weights.get(output, weights.get(output[2:], 1.0))

    def decode(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """(L, T) logits of one text's sub-words → (L,) tag ids that form a legal BIO2 sequence."""
        if self.config.decoding == "viterbi":
            return viterbi(logits)
        return legalise(logits.argmax(axis=-1), len(self.labels))

    def decide(self, logits: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[Any]:
        """(L, T) logits of the sub-words of texts of these lengths → (L,) tag ids.

        Where every sub-word's likeliest tag makes a legal sequence, that is the answer: no legal
        sequence scores higher. Only the other texts are decoded one by one.
        """
        tags: NDArray[np.int64] = logits.argmax(axis=-1)
        if not len(tags):
            return tags
        ends = np.cumsum(lengths)
        before = np.concatenate([[0], tags[:-1]])
        before[(ends - lengths)[lengths > 0]] = 0
        num_types = len(self.labels)
        illegal = (tags > num_types) & (before != tags) & (before != tags - num_types)
        texts = np.unique(np.searchsorted(ends, np.flatnonzero(illegal), side="right"))
        for text in texts:
            rows = slice(ends[text] - lengths[text], ends[text])
            tags[rows] = self.decode(logits[rows])
        return tags


HEADS: dict[TaskKind, type[Head]] = {
    "classification": ClassificationHead,
    "multilabel": MultilabelHead,
    "token_classification": TokenClassificationHead,
}


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, C) logits → probabilities that sum to 1 over C."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float32] = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def viterbi(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The best-scoring legal BIO2 sequence (Viterbi, 1967, with 0 or -inf as transitions).

    Only I-x is constrained, to follow B-x or I-x. So O and every B- share one best predecessor
    and each I-x has two candidates: O(T) a token where the textbook recursion takes O(T²).

    Args:
        logits: (L, T).

    Returns:
        (L,) tag ids.
    """
    length, num_tags = logits.shape
    num_types = (num_tags - 1) // 2
    begin, inside = slice(1, 1 + num_types), slice(1 + num_types, num_tags)
    begin_ids = np.arange(1, 1 + num_types)
    back = np.zeros((length, num_tags), dtype=np.int64)
    score = np.full(num_tags, -np.inf) if length == 0 else logits[0].astype(np.float64)
    if length:
        score[inside] = -np.inf
    for position in range(1, length):
        best = int(score.argmax())
        from_begin = score[begin] >= score[inside]
        back[position, : 1 + num_types] = best
        back[position, inside] = np.where(from_begin, begin_ids, begin_ids + num_types)
        reached = np.full(num_tags, score[best])
        reached[inside] = np.maximum(score[begin], score[inside])
        score = reached + logits[position]
    tags = np.zeros(length, dtype=np.int64)
    if length:
        tags[-1] = score.argmax()
    for position in range(length - 1, 0, -1):
        tags[position - 1] = back[position, tags[position]]
    return tags


def legalise(tags: NDArray[np.int64], num_types: int) -> NDArray[np.int64]:
    """Turn every I-x that continues nothing into B-x; (L,) tag ids in, (L,) out."""
    legal = tags.copy()
    for position, tag in enumerate(tags):
        if tag > num_types:
            previous = legal[position - 1] if position else 0
            if previous not in (tag, tag - num_types):
                legal[position] = tag - num_types
    return legal


def build_head(hidden_size: int, labels: Sequence[str], config: TaskConfig) -> Head:
    """A fresh head of the task's kind."""
    return HEADS[config.kind](hidden_size, labels, config)
