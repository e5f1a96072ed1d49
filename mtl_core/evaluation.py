"""Scores of a split, counted by all ranks together and exactly as one process counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mtl_core import features, metrics
from mtl_core.data.batching import Rows, collate, evaluation_batches
from mtl_core.data.encoding import IGNORE, EncodedSplit
from mtl_core.heads import Head
from mtl_core.model import Batch, MultiTaskModel
from mtl_core.world import World


@dataclass(frozen=True)
class Evaluation:
    """Counts of one split, over all ranks."""

    kinds: dict[str, Any]
    labels: dict[str, tuple[str, ...]]
    counts: dict[str, metrics.Counts]
    losses: dict[str, float]

    def scores(self) -> dict[str, dict[str, float]]:
        """Task → metric → value; a task the split has no label of is left out."""
        return {
            task: metrics.scores(self.kinds[task], counts)
            for task, counts in self.counts.items()
            if counts.any()
        }

    def score(self, metric: str) -> float:
        """The value of `training.metric`."""
        scores = self.scores()
        if metric != "mean":
            task, _, name = metric.partition("/")
            values = scores.get(task, {})
            return values.get(name or metrics.PRIMARY[self.kinds[task]], 0.0)
        return metrics.mean_score(
            {task: values[metrics.PRIMARY[self.kinds[task]]] for task, values in scores.items()}
        )

    def report(self) -> dict[str, dict[str, Any]]:
        """Task → scores, and precision, recall and F1 a label; tasks as in `scores`."""
        return {
            task: {
                "scores": values,
                "labels": metrics.per_label(self.kinds[task], self.counts[task], self.labels[task]),
            }
            for task, values in self.scores().items()
        }

    def flat(self, split: str) -> dict[str, float]:
        """`split/task/metric` → value, with the loss."""
        row = {
            f"{split}/{task}/{name}": value
            for task, values in self.scores().items()
            for name, value in values.items()
        }
        return row | {f"{split}/{task}/loss": value for task, value in self.losses.items()}


@torch.no_grad()
def evaluate(
    model: MultiTaskModel,
    split: EncodedSplit,
    world: World | None = None,
    bf16: bool = False,
    cache: features.FeatureCache | None = None,
    tasks: list[str] | None = None,
) -> Evaluation:
    """Score a split; each rank takes every n-th batch and the counts are summed.

    Args:
        model: on `world.device`; its modules' training modes are put back afterwards.
        split: encoded with the model's labels.
        world: this rank's place; one process when absent.
        bf16: run the forward pass in bfloat16.
        cache: states of the split's lower layers.
        tasks: which to score; all that the split has when absent.
    """
    world = world or World()
    tasks = tasks or list(split.targets)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    heads = {task: model.head(task) for task in tasks}
    counts = {t: metrics.empty_counts(h.kind, len(h.labels)) for t, h in heads.items()}
    loss = {task: [0.0, 0.0] for task in tasks}
    for index, rows in enumerate(evaluation_batches(split)):
        if index % world.size != world.rank:
            continue
        batch = collate(split, rows, model.encoder.pad_id)
        batch = cache.attach(batch, split, rows) if cache else batch
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            logits = model.logits(batch.to(world.device))
        for task, head in heads.items():
            targets = batch.labelled[task].targets
            loss[task][0] += float(head.loss_sum(logits[task], targets.to(world.device)))
            loss[task][1] += len(targets)
            _count(counts[task], task, head, logits[task].cpu().numpy(), split, rows, batch)
    for module, mode in modes:
        module.training = mode
    reduced = _reduce(world, counts, loss)
    return Evaluation(
        {t: h.kind for t, h in heads.items()}, {t: h.labels for t, h in heads.items()}, *reduced
    )


def _count(
    counts: metrics.Counts,
    task: str,
    head: Head,
    logits: NDArray[np.float32],
    split: EncodedSplit,
    rows: Rows,
    batch: Batch,
) -> None:
    """Add one batch's predictions for one task."""
    if head.level == "sentence":
        gold = batch.labelled[task].targets.numpy()
        count = metrics.count_multilabel if gold.ndim == 2 else metrics.count_classes
        count(counts, gold, head.decide(logits, np.ones(len(gold), dtype=np.int64)))
        return
    labelled = rows[split.present[task][rows]]
    targets, starts = split.targets[task], split.starts
    reals = [targets[starts[row] : starts[row + 1]] != IGNORE for row in labelled]
    lengths = np.array([real.sum() for real in reals], dtype=np.int64)
    decoded = head.decide(logits, lengths)
    first = 0
    for row, real, length in zip(labelled, reals, lengths, strict=True):
        tags = np.zeros(len(real), dtype=np.int64)
        tags[real] = decoded[first : first + length]
        first += length
        words = slice(split.word_starts[row], split.word_starts[row + 1])
        predicted = metrics.word_tags(tags, split.word_tokens[words], len(head.labels))
        gold = split.word_tags[task][words].astype(np.int64)
        metrics.count_entities(counts, gold, predicted)


def _reduce(
    world: World, counts: dict[str, metrics.Counts], loss: dict[str, list[float]]
) -> tuple[dict[str, metrics.Counts], dict[str, float]]:
    """Sum over ranks: integers stay exact."""
    for values in counts.values():
        total = world.all_reduce(torch.from_numpy(values).to(world.device))
        values[...] = total.cpu().numpy()
    sums = torch.tensor(list(loss.values()), dtype=torch.float64, device=world.device)
    pairs = zip(loss, world.all_reduce(sums).tolist(), strict=True)
    return counts, {task: total / number for task, (total, number) in pairs if number}
