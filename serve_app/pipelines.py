"""Answers in the shapes of transformers' pipelines, aggregation strategies included.

What the strategies mean is documented with transformers' TokenClassificationPipeline; ours start
from the decoded tags (a legal sequence) where its "none" and "simple" start from each token's best.
Words are pieces of the text as sent, so that offsets and words always agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mtl_core.answers import TokenOutput
from mtl_core.data.tags import tag_names
from mtl_core.windows import Tokenized
from serve_app.schemas import Strategy

Piece = tuple[int, float, int, int]
"""Tag, score, characters [start, end)."""
OUTSIDE = "O"
"""What is no entity."""


def token_classification(
    output: TokenOutput,
    items: Sequence[Tokenized],
    strategy: Strategy,
    tokenizer: Tokenizer,
    ignored: Collection[str],
) -> list[list[dict[str, Any]]]:
    """Each text's tokens or groups of them, as the token-classification pipeline's.

    Args:
        output: the head's, with every tag's scores if words get their tags of them.
        items: the texts.
        strategy: what is grouped, and how.
        tokenizer: of the texts.
        ignored: what is left out: tags if nothing is grouped, else types; O is one of either.
    """
    answers = []
    first = 0
    for item, length in zip(items, output.lengths.tolist(), strict=True):
        rows = slice(first, first + length)
        first += length
        if strategy == "none":
            answers.append(_tokens(output, rows, item, tokenizer, ignored))
            continue
        if strategy == "simple":
            pieces = _pieces(output, rows, item)
        else:
            assert output.scores is not None, "words need the scores of every tag"
            pieces = _words(output.scores[rows], item, strategy, tokenizer)
        answers.append(_groups(pieces, output.labels, item.text, ignored))
    return answers


def _tokens(
    output: TokenOutput,
    rows: slice,
    item: Tokenized,
    tokenizer: Tokenizer,
    ignored: Collection[str],
) -> list[dict[str, Any]]:
    names = tag_names(output.labels)
    offsets, windows, places = item.placed
    found = []
    for tag, score, (start, end), window, place in zip(
        output.tags[rows].tolist(),
        output.probabilities[rows].tolist(),
        offsets,
        windows.tolist(),
        places.tolist(),
        strict=True,
    ):
        if names[tag] in ignored:
            continue
        found.append(
            {
                "entity": names[tag],
                "score": round(score, 6),
                "index": item.numbers[window][place] + 1,
                "word": tokenizer.id_to_token(item.windows[window][place]),
                "start": start,
                "end": end,
            }
        )
    return found


def _pieces(output: TokenOutput, rows: slice, item: Tokenized) -> Iterable[Piece]:
    tags, scores = output.tags[rows].tolist(), output.probabilities[rows].tolist()
    for tag, score, (start, end) in zip(tags, scores, item.placed[0], strict=True):
        yield tag, score, start, end


def _words(
    scores: NDArray[np.float32], item: Tokenized, strategy: Strategy, tokenizer: Tokenizer
) -> Iterable[Piece]:
    """One tag a word: of its first piece, of the mean over pieces, or of the surest piece."""
    offsets = item.placed[0]
    starts = word_starts(item, tokenizer)
    if not starts:  # sub-words of invisible characters alone stand for nothing
        return []
    ends = [*starts[1:], len(offsets)]
    lengths = np.subtract(ends, starts)
    if strategy == "first":
        rows = scores[starts]
    elif strategy == "average":
        sums = np.add.reduceat(scores, starts, axis=0)
        rows = np.divide(sums, lengths[:, None], dtype=np.float32)
    else:
        words = np.repeat(np.arange(len(starts)), lengths)
        rows = scores[np.lexsort((-scores.max(axis=1), words))[starts]]
    tags, best = rows.argmax(axis=1).tolist(), rows.max(axis=1).tolist()
    places = zip(starts, ends, strict=True)
    ranges = [(offsets[start][0], offsets[end - 1][1]) for start, end in places]
    return [(tag, score, *place) for tag, score, place in zip(tags, best, ranges, strict=True)]


def word_starts(item: Tokenized, tokenizer: Tokenizer) -> list[int]:
    """Which of a text's sub-words begin a word.

    By the tokenizer's mark for continuing pieces where it has one (##), else by the space before.
    """
    offsets, windows, places = item.placed
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    starts = []
    for number, (start, _) in enumerate(offsets):
        if prefix:
            token = tokenizer.id_to_token(item.windows[windows[number]][places[number]])
            begins = token is None or not token.startswith(prefix)
        else:
            begins = start == 0 or start > offsets[number - 1][1] or item.text[start - 1].isspace()
        if begins or number == 0:
            starts.append(number)
    return starts


def _groups(
    pieces: Iterable[Piece], labels: Sequence[str], text: str, ignored: Collection[str]
) -> list[dict[str, Any]]:
    """Adjacent pieces of one type, or of none; a B- tag begins anew."""
    num_types, names = len(labels), (OUTSIDE, *labels)
    groups: list[tuple[int, list[float], int, int]] = []
    for tag, score, start, end in pieces:
        kind = (tag - 1) % num_types + 1 if tag else 0
        if groups and kind == groups[-1][0] and not 1 <= tag <= num_types:
            _, scores, begin, _ = groups[-1]
            scores.append(score)
            groups[-1] = (kind, scores, begin, end)
        else:
            groups.append((kind, [score], start, end))
    return [
        {
            "entity_group": names[kind],
            "score": round(sum(scores) / len(scores), 6),
            "word": text[start:end],
            "start": start,
            "end": end,
        }
        for kind, scores, start, end in groups
        if names[kind] not in ignored
    ]
