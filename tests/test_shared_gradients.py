"""Shares of the gradient; sums over processes are compared in test_loop_distributed.py."""

from __future__ import annotations

import os
import random
from contextlib import ExitStack

import pytest

from mtl_core import shared_gradients
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


def test_memory_without_a_name_is_mapped_by_who_is_told_of_it() -> None:
    with ExitStack() as opened:
        offer = shared_gradients._offer(opened)
        assert offer is not None
        path, name = offer
        first, second = (shared_gradients._map(path, name, 6) for _ in range(2))
        assert shared_gradients._map(path, "another machine's", 6) is None
        assert shared_gradients._map(f"/proc/{os.getpid()}/fd/99999", name, 6) is None
    assert first is not None
    assert second is not None
    first.fill_(3)
    assert second.tolist() == [3] * 6  # and it outlives the descriptor
    assert shared_gradients._map(path, name, 6) is None


@pytest.mark.parametrize("refusal", [OSError("no memory files here"), AttributeError()])
def test_a_system_that_gives_no_such_memory_leaves_workers_to_sockets(
    refusal: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> int:
        raise refusal

    monkeypatch.setattr(os, "memfd_create", refuse)
    with ExitStack() as opened:
        assert shared_gradients._offer(opened) is None
