"""Shares of the gradient; sums over processes are compared in test_loop_distributed.py."""

from __future__ import annotations

import random

import pytest

from mtl_core.shared_gradients import even_shares


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_no_rank_has_more_of_the_gradient_than_the_others_by_a_parameter(ranks: int) -> None:
    draw = random.Random(ranks)
    sizes = [draw.choice([384, 1536, 147_456, 589_824]) for _ in range(100)] + [3_700_000]
    owners = even_shares(sizes, ranks)
    loads = [0] * ranks
    for size, owner in zip(sizes, owners, strict=True):
        loads[owner] += size
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes)
    assert max(loads) <= max(max(sizes), sum(sizes) / ranks + 589_824)


def test_a_rank_may_be_left_without_a_share() -> None:
    assert sorted(even_shares([10, 20], 4)) == [0, 1]
