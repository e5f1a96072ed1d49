"""Text in, embeddings, labels and entities out: the one inference path.

Offline prediction and every serving replica run this code. Shapes: N texts, D embedding size,
L tokens, T tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl_core.artifact import load_model
from mtl_core.data.encoding import token_offsets
from mtl_core.heads import Head, MultilabelHead, TokenClassificationHead
from mtl_core.model import MultiTaskModel

Float = NDArray[np.float32]
Offsets = list[tuple[int, int]]
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Label(TypedDict):
    label: str
    score: float


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


class TextError(ValueError):
    """A text that cannot be predicted for."""


@dataclass(frozen=True)
class Tokenized:
    """One text as one or more overlapping windows that fit the model."""

    text: str
    offsets: Offsets
    """Characters [start, end) of each of the text's sub-words; empty where one stands for none."""
    windows: list[list[int]]
    """Sub-word ids of each window, special tokens included."""
    numbers: list[list[int]]
    """Which of the text's sub-words each window holds: places in `offsets`, -1 for specials."""


class Predictor:
    """A model on a device, ready for texts."""

    def __init__(self, model: MultiTaskModel, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.tokenizer = model.encoder.tokenizer
        self.batch_tokens = 4096

    @classmethod
    def load(cls, artifact: str | Path, device: str | torch.device = "cpu") -> Self:
        """Open an artifact folder.

        Raises:
            ArtifactError: the folder is damaged or newer than this software.
        """
        return cls(load_model(artifact), device)

    @property
    def tasks(self) -> list[str]:
        return list(self.model.heads)

    def embed(self, texts: Sequence[str]) -> Float:
        """(N, D) unit-length sentence vectors; a text beyond the window counts by its beginning."""
        tokenized = self.tokenize(texts)
        vectors = np.zeros((len(texts), self.model.encoder.hidden_size), dtype=np.float32)
        for place, _, pooled in self._encode([item.windows[0] for item in tokenized]):
            vectors[place] = pooled.cpu().numpy()
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: Float = vectors / np.maximum(norms, 1e-12)
        return unit

    def predict(
        self, texts: Sequence[str], tasks: Sequence[str] | None = None
    ) -> list[dict[str, Prediction]]:
        """Every task's answer for every text, from one pass through the encoder a text.

        Entities of a text beyond the model's window come from overlapping windows, so none is
        lost; labels are those of its beginning.

        Raises:
            TextError: a text is empty or blank.
            KeyError: an unknown task.
        """
        heads = {task: self.model.head(task) for task in (self.tasks if tasks is None else tasks)}
        tokenized = self.tokenize(texts)
        windows = [
            (text, w) for text, item in enumerate(tokenized) for w in range(len(item.windows))
        ]
        wants_tokens = any(head.level == "token" for head in heads.values())
        windows = [(text, w) for text, w in windows if w == 0 or wants_tokens]
        token_logits: dict[str, dict[tuple[int, int], Float]] = {task: {} for task in heads}
        results: list[dict[str, Prediction]] = [{} for _ in texts]
        ids = [tokenized[text].windows[w] for text, w in windows]
        for place, states, pooled in self._encode(ids):
            text, window = windows[place]
            for task, head in heads.items():
                if head.level == "token":
                    token_logits[task][text, window] = _logits(head, states)
                elif window == 0:
                    results[text][task] = label_prediction(head, _logits(head, pooled[None])[0])
        for text, item in enumerate(tokenized):
            for task, head in heads.items():
                if isinstance(head, TokenClassificationHead):
                    parts = [token_logits[task][text, w] for w in range(len(item.windows))]
                    logits, offsets = stitch(parts, item)
                    results[text][task] = entity_predictions(head, logits, offsets, item.text)
        return [{task: row[task] for task in heads} for row in results]

    def similarity(self, texts: Sequence[str]) -> Float:
        """(N, N) cosines between sentence vectors."""
        vectors = self.embed(texts)
        cosines: Float = np.clip(vectors @ vectors.T, -1.0, 1.0)
        return cosines

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        """Split texts into sub-words, and those beyond the window into overlapping windows."""
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise TextError(f"text {number + 1} is empty or only spaces")
            if _LONE_SURROGATE.search(text):
                raise TextError(f"text {number + 1} is no valid Unicode: it holds half a character")
        if not texts:
            return []
        limit = self.model.encoder.max_length
        stride = min(limit // 4, max(limit - 8, 0))
        encoded = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=limit,
            return_overflowing_tokens=True,
            stride=stride,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        items = [Tokenized(text, [], [], []) for text in texts]
        advance = limit - self.tokenizer.num_special_tokens_to_add() - stride
        rows = zip(
            encoded["overflow_to_sample_mapping"],
            encoded["input_ids"],
            encoded["offset_mapping"],
            encoded["special_tokens_mask"],
            strict=True,
        )
        for source, ids, offsets, special in rows:
            item = items[source]
            numbers = np.cumsum(1 - np.array(special)) - 1 + advance * len(item.windows)
            item.windows.append(ids)
            item.numbers.append(np.where(special, -1, numbers).tolist())
            known = len(item.offsets)
            pairs = zip(item.numbers[-1], offsets, strict=True)
            item.offsets.extend(offset for number, offset in pairs if number >= known)
        for item in items:
            item.offsets[:] = token_offsets(item.text, item.offsets)
        return items

    @torch.inference_mode()
    def _encode(self, windows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Window number, its token states (L, H) and pooled vector (H,); in batches by length."""
        order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
        pad = int(self.tokenizer.pad_token_id or 0)
        first = 0
        while first < len(order):
            last = first + 1
            while last < len(order) and (
                (last + 1 - first) * len(windows[order[last]]) <= self.batch_tokens
            ):
                last += 1
            rows = order[first:last]
            width = len(windows[rows[-1]])
            ids = torch.full((len(rows), width), pad, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(rows):
                ids[row, : len(windows[number])] = torch.tensor(windows[number])
                mask[row, : len(windows[number])] = 1
            states, pooled = self.model.encoder(ids.to(self.device), mask.to(self.device))
            for row, number in enumerate(rows):
                yield number, states[row, : len(windows[number])], pooled[row]
            first = last


@torch.inference_mode()
def _logits(head: Head, features: Tensor) -> Float:
    return head(features).cpu().numpy()  # type: ignore[no-any-return]


def label_prediction(head: Head, logits: Float) -> Classification | Multilabel:
    """(C,) logits of a sentence head → its answer."""
    probabilities = head.scores(logits)  # type: ignore[operator]
    scores = {name: round(float(p), 6) for name, p in zip(head.labels, probabilities, strict=True)}
    if isinstance(head, MultilabelHead):
        likely = probabilities >= head.config.threshold
        chosen = [name for name, yes in zip(head.labels, likely, strict=True) if yes]
        return {"labels": chosen, "scores": scores}
    best = head.labels[int(logits.argmax())]
    return {"label": best, "score": scores[best], "scores": scores}


def stitch(parts: Sequence[Float], item: Tokenized) -> tuple[Float, Offsets]:
    """One sequence from overlapping windows: each sub-word from where it has most context.

    Args:
        parts: (L, T) logits of each window.
        item: the windows; sub-words that stand for no text are dropped.

    Returns:
        (L', T) logits and the L' character ranges, in the order of the text.
    """
    best: dict[int, tuple[int, Float]] = {}
    for logits, numbers in zip(parts, item.numbers, strict=True):
        for place, number in enumerate(numbers):
            context = min(place, len(numbers) - 1 - place)
            if number >= 0 and (number not in best or context > best[number][0]):
                best[number] = (context, logits[place])
    kept = [number for number, (start, end) in enumerate(item.offsets) if start < end]
    width = parts[0].shape[1]
    rows = np.array([best[number][1] for number in kept], dtype=np.float32).reshape(-1, width)
    return rows, [item.offsets[number] for number in kept]


def entity_predictions(
    head: TokenClassificationHead, logits: Float, offsets: Offsets, text: str
) -> list[Entity]:
    """(L, T) logits of a text's sub-words → its entities, in order."""
    tags = head.decode(logits)
    probabilities = head.scores(logits)
    num_types = len(head.labels)
    found: list[list[int]] = []
    for position, tag in enumerate(tags):
        if 1 <= tag <= num_types:
            found.append([])
        if tag:
            found[-1].append(position)
    entities: list[Entity] = []
    for positions in found:
        start, end = offsets[positions[0]][0], offsets[positions[-1]][1]
        entities.append(
            Entity(
                entity_group=head.labels[tags[positions[0]] - 1],
                score=round(float(probabilities[positions, tags[positions]].mean()), 6),
                word=text[start:end],
                start=start,
                end=end,
            )
        )
    return entities


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
