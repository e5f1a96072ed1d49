"""Which rows make a batch: mixing, length buckets, sharding by rank.

The batch is global: it is chosen for all workers together and then dealt out. So the number of
workers changes how fast a step is, never what it computes, and the schedule is a function of
(seed, epoch, step) alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mtl_core.config import MixingConfig
from mtl_core.data.encoding import IGNORE, EncodedSplit
from mtl_core.model import Batch, Labelled

Rows = NDArray[np.int64]
BATCHES_PER_BUCKET = 50


class Schedule:
    """The batches of every epoch.

    Rows are grouped by the set of tasks they carry; mixing strategies choose among groups.
    """

    def __init__(
        self,
        split: EncodedSplit,
        mixing: MixingConfig,
        batch_size: int,
        batch_tokens: int | None,
        seed: int,
        shard: int | None = None,
    ) -> None:
        self.mixing = mixing
        self.seed = seed
        self.shard = () if shard is None else (shard,)
        self.groups = task_groups(split)
        self.cost = split.lengths if batch_tokens else np.ones(len(split), dtype=np.int64)
        self.lengths = split.lengths
        self.budget = batch_tokens or batch_size

    def batches(self, epoch: int) -> list[Rows]:
        """The epoch's batches in order, each an array of row numbers."""
        random = np.random.default_rng([self.seed, epoch, *self.shard])
        strategy = self.mixing.strategy
        if strategy == "round_robin":
            return self._alternate(random)
        if strategy == "joint":
            return self._bucket([random.permutation(group) for group in self.groups], random)
        if strategy == "temperature":
            drawn = np.concatenate(self._draw(random))
            return self._bucket([random.permutation(drawn)], random)
        return self._bucket([random.permutation(np.concatenate(self.groups))], random)

    def _draw(self, random: np.random.Generator) -> list[Rows]:
        """As many rows as the data has, each group by its size^(1/temperature).

        The sampling of multilingual BERT and T5; small groups are gone through more than once.
        """
        sizes = np.array([len(group) for group in self.groups], dtype=np.float64)
        shares = (sizes / sizes.max()) ** (1 / self.mixing.temperature)
        counts = np.maximum(1, np.rint(shares / shares.sum() * sizes.sum())).astype(int)
        return [_cycle(group, n, random) for group, n in zip(self.groups, counts, strict=True)]

    def _alternate(self, random: np.random.Generator) -> list[Rows]:
        """One batch of each group in turn until the largest is through; smaller ones start over."""
        per_group = [self._bucket([random.permutation(group)], random) for group in self.groups]
        rounds = max(len(batches) for batches in per_group)
        for group, batches in zip(self.groups, per_group, strict=True):
            while len(batches) < rounds:
                batches.extend(self._bucket([random.permutation(group)], random))
        return [batches[i] for i in range(rounds) for batches in per_group]

    def _bucket(self, parts: Sequence[Rows], random: np.random.Generator) -> list[Rows]:
        """Cut shuffled rows into batches of similar length, in random order.

        Every batch takes an equal share of every part. Rows are sorted by length only within
        buckets of some batches, so that batches stay random and change from epoch to epoch.
        """
        total = sum(int(self.cost[part].sum()) for part in parts)
        num_batches = max(1, min(-(-total // self.budget), max(len(part) for part in parts)))
        num_buckets = max(1, round(num_batches / BATCHES_PER_BUCKET))
        sizes = np.diff(np.linspace(0, num_batches, num_buckets + 1).astype(int))
        parts = [p if len(p) >= num_batches else _cycle(p, num_batches, random) for p in parts]
        ends = np.cumsum(sizes)[:-1]
        cuts = [np.split(part, len(part) * ends // num_batches) for part in parts]
        batches: list[Rows] = []
        for bucket, size in enumerate(sizes):
            slices = []
            for cut in cuts:
                rows = cut[bucket]
                rows = rows[np.argsort(self.lengths[rows], kind="stable")]
                slices.append(self._cut(rows, np.arange(1, size) / size))
            batches.extend(np.concatenate(rows) for rows in zip(*slices, strict=True))
        order = random.permutation(len(batches))
        return [batches[i] for i in order if len(batches[i])]

    def _cut(self, rows: Rows, fractions: NDArray[np.float64]) -> list[Rows]:
        """Split rows where their summed cost passes the fractions, never leaving one empty."""
        cost = np.cumsum(self.cost[rows])
        places = np.searchsorted(cost, fractions * (cost[-1] if len(cost) else 0), side="right")
        first = np.arange(1, len(fractions) + 1)
        places = np.clip(places, first, np.maximum(first, len(rows) - len(fractions) + first - 1))
        return np.split(rows, places)


def task_groups(split: EncodedSplit) -> list[Rows]:
    """Row numbers grouped by the set of tasks they carry, in order of first appearance."""
    present = np.stack(list(split.present.values()), axis=1)
    _, first, inverse = np.unique(present, axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    return [np.flatnonzero(inverse == group) for group in np.argsort(first)]


def _cycle(rows: Rows, count: int, random: np.random.Generator) -> Rows:
    """`count` rows, going through all of them, newly shuffled, before any comes again."""
    rounds = -(-count // len(rows))
    return np.concatenate([random.permutation(rows) for _ in range(rounds)])[:count]


def deal(rows: Rows, lengths: NDArray[np.int64], rank: int, world_size: int) -> Rows:
    """One rank's part of a batch, dealt by length so that ranks carry alike."""
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    return ordered[rank::world_size]


def evaluation_batches(split: EncodedSplit, batch_tokens: int = 2048) -> Iterator[Rows]:
    """All rows in order of length, in batches of about so many padded tokens."""
    order = np.argsort(split.lengths, kind="stable")
    first = 0
    while first < len(order):
        last = first + 1
        while last < len(order) and (
            (last + 1 - first) * split.lengths[order[last]] <= batch_tokens
        ):
            last += 1
        yield order[first:last]
        first = last


def collate(
    split: EncodedSplit,
    rows: Rows,
    pad_id: int,
    without_labels: bool = False,
    multiple_of: int = 1,
) -> Batch:
    """Rows as a padded batch.

    Args:
        split: where the rows are.
        rows: (B,) row numbers.
        pad_id: the tokenizer's padding id.
        without_labels: leave every task unlabelled.
        multiple_of: round the padded length up to this; GPUs are fast at few, even shapes.
    """
    lengths = split.starts[rows + 1] - split.starts[rows]
    width = int(-(-lengths.max() // multiple_of) * multiple_of)
    inside = np.arange(width) < lengths[:, None]
    flat = np.concatenate([np.arange(split.starts[r], split.starts[r + 1]) for r in rows])
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    input_ids[inside] = split.input_ids[flat]
    labelled = {}
    for task, target in split.targets.items():
        if task in split.word_tags:  # it labels tokens
            grid = np.full((len(rows), width), IGNORE, dtype=np.int64)
            grid[inside] = target[flat]
            values = grid.reshape(-1)
            positions = np.flatnonzero(values != IGNORE)
            values = values[positions]
        else:
            positions = np.flatnonzero(split.present[task][rows])
            values = target[rows[positions]].astype(np.int64)
        if without_labels:
            positions, values = positions[:0], values[:0]
        labelled[task] = Labelled(torch.from_numpy(positions), torch.from_numpy(values))
    mask = torch.from_numpy(inside.astype(np.int64))
    return Batch(torch.from_numpy(input_ids), mask, labelled)
