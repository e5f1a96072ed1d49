"""Layouts: every sequence is in one place, and rows that hold several have little rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mtl_core.packing import CACHED_TOKENS, PASS_TOKENS, ROW_TOKENS, STEP, pack, pad

SEQUENCES = st.lists(
    st.integers(1, 200).map(lambda length: list(range(1000, 1000 + length))),
    min_size=1,
    max_size=40,
)


@pytest.mark.parametrize("arrange", [pad, pack])
@given(sequences=SEQUENCES, batch_tokens=st.integers(16, 1000))
def test_every_sequence_is_in_one_place(
    arrange: Callable, sequences: list[list[int]], batch_tokens: int
) -> None:
    seen: list[int] = []
    for layout in arrange(sequences, 7, batch_tokens):
        rows, width = layout.input_ids.shape
        assert rows == 1 or rows * width <= batch_tokens
        ids, segments = layout.input_ids.ravel(), layout.segments.ravel()
        taken = np.zeros(ids.size, dtype=bool)
        for number, start, length in zip(
            layout.numbers, layout.starts, layout.lengths, strict=True
        ):
            here = slice(start, start + length)
            assert ids[here].tolist() == sequences[number]
            assert start // width == (start + length - 1) // width
            assert len(set(segments[here])) == 1
            row = segments.reshape(rows, width)[start // width]
            assert segments[start] > 0
            assert (row == segments[start]).sum() == length
            assert layout.positions.ravel()[here].tolist() == list(range(length))
            assert not taken[here].any()
            taken[here] = True
        assert not segments[~taken].any()
        assert set(ids[~taken]) <= {7}
        seen += layout.numbers
    assert sorted(seen) == list(range(len(sequences)))


@given(sequences=SEQUENCES, batch_tokens=st.integers(16, 1000))
def test_a_padded_batch_ends_only_where_one_row_more_would_cost_more(
    sequences: list[list[int]], batch_tokens: int
) -> None:
    for batch, following in pairwise(pad(sequences, 7, batch_tokens)):
        (rows, width), longer = batch.input_ids.shape, min(following.lengths)
        too_large = (rows + 1) * longer > batch_tokens
        assert too_large or rows * (longer - width) > PASS_TOKENS


@given(lengths=st.lists(st.integers(1, 60), min_size=4, max_size=80), streams=st.integers(1, 4))
@example(lengths=[60] * 40, streams=2)
def test_no_stream_is_left_without_work(lengths: list[int], streams: int) -> None:
    layouts = list(pack([[1] * length for length in lengths], 0, 4096, streams))
    rows = [len(layout.input_ids) for layout in layouts]
    assert len(rows) % streams == 0 or len(rows) < streams
    assert len(rows) < math.ceil(sum(rows) / (CACHED_TOKENS // ROW_TOKENS)) + streams
    assert max(rows) - min(rows) <= 1
    assert min(rows) >= 2 or len(rows) == 1 or sum(rows) < 2 * len(rows)


def best_fit(lengths: list[int]) -> int:
    """How many rows the longest first take, each where the least room is left."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        room = min(fitting, default=max(ROW_TOKENS, math.ceil(length / STEP) * STEP))
        rooms.append(room - length)
    return len(rooms)


@given(lengths=st.lists(st.integers(1, 60) | st.integers(1, 512), min_size=1, max_size=200))
def test_hardly_a_row_could_have_taken_in_another(lengths: list[int]) -> None:
    layouts = list(pack([[1] * length for length in lengths], 0, 4096))
    used = sorted(
        sum(layout.lengths[layout.starts // layout.input_ids.shape[1] == row])
        for layout in layouts
        for row in range(len(layout.input_ids))
    )
    assert sum(used) == sum(lengths)
    assert len(used) == best_fit(lengths)
    # Best fit: the second emptiest row did not fit into what the emptiest has left.
    assert len(used) == 1 or used[0] + used[1] > ROW_TOKENS
    for layout in layouts:
        assert layout.input_ids.shape[1] % 16 == 0
        assert layout.input_ids.shape[1] < max(*layout.lengths, ROW_TOKENS) + STEP + 1
