"""Sequences of sub-words laid out as rectangles: one a row with padding, or several in a row.

Shapes: S sequences, n rows and W columns of a rectangle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Sequences = Sequence[Sequence[int]]
PASS_TOKENS = 24
"""What starting a forward pass costs, in tokens of MiniLM on a CPU (about a millisecond)."""
GPU_PASS_TOKENS = 1024
"""The same on a GPU, where starting the kernels takes most of a small pass. Not measured: 10 ms a
pass and 100,000 tokens a second are assumed."""
ROW_TOKENS = 64
"""Columns of a row that holds several sequences: attention costs more in longer ones, and shorter
ones have more rest."""
STEP = 32
"""Rows for longer sequences are so much wider: few shapes, as every one is compiled."""
CACHED_TOKENS = 512
"""In a packed rectangle, at most: what a layer computes for them stays in a core's cache."""


@dataclass(frozen=True)
class Layout:
    """What goes through the encoder at once."""

    numbers: list[int]
    """(S,) which of the sequences."""
    starts: Ids
    """(S,) where each begins, in the flattened rectangle."""
    lengths: Ids
    """(S,)."""
    input_ids: Ids
    """(n, W)."""
    segments: Ids
    """(n, W) 1, 2, … for the sequences of a row, 0 for padding: the mask where each has a row."""
    positions: Ids
    """(n, W) places within the own sequence, from 0."""


def pad(
    sequences: Sequences, pad_id: int, batch_tokens: int, pass_tokens: int = PASS_TOKENS
) -> Iterator[Layout]:
    """A row each, by length, in rectangles of no more than `batch_tokens` unless one row is.

    A pass more costs as much as `pass_tokens`.
    """
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    lengths = [len(sequences[number]) for number in order]
    first = 0
    while first < len(order):
        last = batch_end(lengths, first, batch_tokens, pass_tokens)
        rows = [[number] for number in order[first:last]]
        yield layout(rows, lengths[last - 1], sequences, pad_id)
        first = last


def pack(
    sequences: Sequences, pad_id: int, batch_tokens: int, streams: int = 1
) -> Iterator[Layout]:
    """Several a row, the longest first, each where the least room is left (best fit).

    For a model that attends within segments only: hardly any padding, whatever the lengths, and
    few shapes. Rectangles are bounded by `CACHED_TOKENS`, too, and enough for that many streams.
    """
    by_width: dict[int, list[list[int]]] = {}
    rooms: dict[int, list[tuple[int, list[int]]]] = {}
    for number in sorted(range(len(sequences)), key=lambda n: len(sequences[n]), reverse=True):
        length = len(sequences[number])
        room = next((r for r in range(length, ROW_TOKENS + STEP) if rooms.get(r)), None)
        if room is None:
            width = room = max(ROW_TOKENS, -(-length // STEP) * STEP)
            row: list[int] = []
            by_width.setdefault(width, []).append(row)
        else:
            width, row = rooms[room].pop()
        row.append(number)
        rooms.setdefault(room - length, []).append((width, row))
    for width, rows in by_width.items():
        most = max(1, min(batch_tokens, CACHED_TOKENS) // width)
        count = -(-len(rows) // most)
        if count < streams:
            count = max(count, min(streams, len(rows) // 2))
        else:
            count = min(-(-count // streams) * streams, len(rows))
        for index in range(count):
            first, last = (len(rows) * end // count for end in (index, index + 1))
            part = rows[first:last]
            used = max(sum(len(sequences[number]) for number in row) for row in part)
            yield layout(part, min(width, -(-used // 16) * 16), sequences, pad_id)


def layout(rows: Sequence[Sequence[int]], width: int, sequences: Sequences, pad_id: int) -> Layout:
    """The rectangle with these sequences in these rows."""
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    segments = np.zeros_like(input_ids)
    positions = np.zeros_like(input_ids)
    numbers, starts, lengths = [], [], []
    counted = np.arange(width)
    for index, row in enumerate(rows):
        first = 0
        for segment, number in enumerate(row, start=1):
            length = len(sequences[number])
            here = slice(first, first + length)
            input_ids[index, here] = sequences[number]
            segments[index, here] = segment
            positions[index, here] = counted[:length]
            numbers.append(number)
            starts.append(index * width + first)
            lengths.append(length)
            first += length
    return Layout(numbers, np.array(starts), np.array(lengths), input_ids, segments, positions)


def batch_end(lengths: Sequence[int], first: int, batch_tokens: int, pass_tokens: int) -> int:
    """Where a padded batch that begins at `first` ends, given ascending lengths.

    It ends before it has too many padded tokens, or where one more row would add more padding
    than another forward pass costs.
    """
    last = first + 1
    while last < len(lengths):
        rows, width = last - first, lengths[last]
        padding = rows * (width - lengths[last - 1])
        if (rows + 1) * width > batch_tokens or padding > pass_tokens:
            break
        last += 1
    return last
