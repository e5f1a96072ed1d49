"""Training: what an optimiser step computes, and in what order steps come.

`fit` is a generator of progress. Each optimiser step works on one global batch: every rank gets a
share of its rows, each task's loss is divided by the number of its labels in the whole step, and
gradients are summed over ranks and micro-batches. So one process and many, one batch and several
accumulated ones, compute the same gradient, but for the masks of dropout.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mtl_core import features, freezing, optim
from mtl_core.config import Experiment
from mtl_core.data.batching import Rows, Schedule, collate, deal
from mtl_core.data.encoding import EncodedSplit
from mtl_core.data.prepare import Data
from mtl_core.data.shards import ShardLoader, Unsharded
from mtl_core.dropout import QuickDropout
from mtl_core.errors import TrainingError
from mtl_core.evaluation import evaluate
from mtl_core.model import Batch, MultiTaskModel
from mtl_core.runtime import bound_kernel_caches, use_bf16
from mtl_core.shared_gradients import SharedGradients
from mtl_core.state import TrainState
from mtl_core.weighting import Step
from mtl_core.world import World

LOG_EVERY = 10
"""Optimiser steps between two progress events."""


@dataclass(frozen=True)
class Event:
    """Something worth telling: a row of metrics.jsonl, or that a checkpoint is due."""

    kind: Literal["features", "shard", "step", "validation", "checkpoint", "stopped"]
    row: dict[str, Any]


def fit(
    state: TrainState, data: Data, experiment: Experiment, world: World | None = None
) -> Iterator[Event]:
    """Train to the end, from wherever `state` stands.

    `state` changes between events; whoever sees a "checkpoint" event may save it, and training
    goes on from it exactly as if it had never stopped. At the end the model holds the best weights.

    Args:
        state: model, optimiser and progress; on a model that is already on `world.device`.
        data: encoded "train", and "validation" to choose by.
        experiment: what to do.
        world: this rank's place; one process on the CPU when absent.

    Yields:
        Progress; "validation" and "checkpoint" come on every rank together.

    Raises:
        TrainingError: the loss or its gradient is not finite.
        DataError: a shard's rows cannot be read.
        OSError: the disk is full for a shard or for the feature cache.
    """
    world = world or World()
    if state.optimizer is None:
        return
    run = _Run(state, data, experiment, world)
    with contextlib.closing(run.parts):
        yield from run.prepare_features()
        while state.epoch < experiment.training.epochs:
            if run.out_of_patience():
                reason = f"no better score for {experiment.training.patience} epochs"
                yield Event("stopped", {"epoch": state.epoch, "reason": reason})
                break
            yield from run.epoch()
    state.restore_best()


class _Run:
    """One call of `fit`: what its steps share."""

    def __init__(self, state: TrainState, data: Data, experiment: Experiment, world: World) -> None:
        self.state, self.data, self.experiment, self.world = state, data, experiment, world
        assert state.optimizer is not None
        self.model, self.optimizer = state.model, state.optimizer
        self.weighting = state.model.weighting
        self.parts: Unsharded | ShardLoader
        if data.shards is None:
            self.parts = Unsharded(data.splits["train"])
        else:
            key = data.keys["train"]
            self.parts = ShardLoader(experiment, data.shards, key, data.labels, world)
        self.train: EncodedSplit
        self.taken: int | None = None
        """Which part `train` is."""
        self.tasks = list(experiment.tasks)
        self.bf16 = use_bf16(experiment.training.precision, world.device)
        bound_kernel_caches()
        self.pad_id = self.model.encoder.pad_id
        self.caches: dict[str, features.FeatureCache] = {}
        self.wrapped: MultiTaskModel | DistributedDataParallel = self.model
        self.shared: SharedGradients | None = None
        self.connected = False

    def prepare_features(self) -> Iterator[Event]:
        """Run what never learns once, when it is worth a file."""
        model, data, world, caches = self.model, self.data, self.world, self.caches
        sample = data.splits["validation"]
        depth = features.cached_layers(model, self.experiment, sample, world.device)
        if depth == 0 or data.shards is not None:
            return
        for name in ("train", "validation"):
            split = data.splits.get(name)
            if split is None or not len(split):
                continue
            row = {"split": name, "texts": len(split), "layers": depth}
            shown = 0.0
            for done in features.open_cache(caches, name, model, data, depth, world, self.bf16):
                if done >= shown + 0.1 and done < 1:
                    shown = done
                    yield Event("features", {**row, "done": round(done, 2)})
            yield Event("features", {**row, "done": 1.0})

    def epoch(self) -> Iterator[Event]:
        """The rest of the epoch that the state stands in, then validation."""
        state = self.state
        changed = freezing.apply_freezing(self.model, self.experiment.freeze, state.epoch)
        if changed or not self.connected:
            self._connect()
        order = self.parts.order(state.epoch)
        for place in range(state.part if self._learns() else len(order), len(order)):
            yield from self._part(order, place)
            state.part, state.step_in_part = place + 1, 0
        yield from self._finish_epoch()

    def _part(self, order: list[int], place: int) -> Iterator[Event]:
        """The rest of one part of the training texts: all of them, or a shard."""
        state, config = self.state, self.experiment.training
        number = order[place]
        self._take_up(order, place)
        if self.data.shards is not None:
            row = {"shard": place + 1, "shards": len(order), "texts": len(self.train)}
            yield Event("shard", {**row, "rows": self.parts.sizes[number]})
        before = sum(self.parts.sizes[n] for n in order[:place]) / sum(self.parts.sizes)
        share = self.parts.sizes[number] / sum(self.parts.sizes)
        steps = self._steps()
        log = _StepLog(self.tasks)
        for index in range(state.step_in_part, len(steps)):
            done = before + share * (index + 0.5) / len(steps)
            factor = optim.set_rates(
                self.optimizer, self.experiment.optim, (state.epoch + done) / config.epochs
            )
            self._step(steps[index], log)
            state.step += 1
            state.step_in_part = index + 1
            if state.step % LOG_EVERY == 0 or state.step_in_part == len(steps):
                of = max(1, round(len(steps) / share))
                in_epoch = round(before * of) + index + 1
                yield Event("step", self._step_row(log, in_epoch, of, factor))
                log = _StepLog(self.tasks)
            due = config.checkpoint_every and state.step % config.checkpoint_every == 0
            if due and (state.step_in_part < len(steps) or place + 1 < len(order)):
                yield Event("checkpoint", {"step": state.step})

    def _learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def _take_up(self, order: list[int], place: int) -> None:
        """Have a part of the training texts at hand, and the one after it made meanwhile."""
        following = order[place + 1 : place + 2]
        if not following and self.state.epoch + 1 < self.experiment.training.epochs:
            following = self.parts.order(self.state.epoch + 1)[:1]
        train = self.parts.open(order[place], following[0] if following else None)
        if self.taken != order[place]:
            self.train, self.taken = train, order[place]
            self.counts = {task: train.label_counts(task) for task in self.tasks}
            shard = None if self.data.shards is None else self.taken
            config, seed = self.experiment.training, self.experiment.seed
            self.schedule = Schedule(
                train, self.experiment.mixing, config.batch_size, config.batch_tokens, seed, shard
            )

    def _steps(self) -> list[list[Rows]]:
        """The batches of a part of the texts by optimiser step."""
        batches = self.schedule.batches(self.state.epoch)
        size = self.experiment.training.accumulation
        return [batches[first : first + size] for first in range(0, len(batches), size)]

    def _connect(self) -> None:
        """Have the gradients of what learns now averaged over ranks, anew whenever that changes.

        Skipped where the weighting strategy averages gradients itself.
        """
        self.connected, self.wrapped, self.shared = True, self.model, None
        if self.world.size == 1 or not self._learns() or self.weighting.reduces_gradients:
            return
        with freezing.without_unused(self.model.encoder):
            self._share_gradients()

    def _share_gradients(self) -> None:
        """Through shared memory where all ranks can, else by DDP."""
        on_cpu = self.world.device.type == "cpu"
        if on_cpu:
            learning = [p for p in self.model.parameters() if p.requires_grad]
            self.shared = SharedGradients.open(learning, self.world.rank, self.world.size)
        if self.shared is None:
            self.wrapped = DistributedDataParallel(
                self.model,
                device_ids=None if on_cpu else [self.world.device],
                gradient_as_bucket_view=True,
                forward_sync_buffers=False,
            )

    def _step(self, batches: list[Rows], log: _StepLog) -> None:
        """One optimiser step over one or more accumulated batches."""
        dropout = self._dropout()
        held = [{t: int(self.counts[t][rows].sum()) for t in self.tasks} for rows in batches]
        counts = {task: sum(labels[task] for labels in held) for task in self.tasks}
        started = time.perf_counter()
        step = Step(self.experiment.seed, self.state.step, counts)
        self.weighting.begin_step(step, self.model.encoder, self.model.heads)
        for index, rows in enumerate(batches):
            share = {task: held[index][task] / max(counts[task], 1) for task in self.tasks}
            batch, tokens = self._micro_batch(rows)
            last = index == len(batches) - 1
            wrapped = self.wrapped
            waits = (
                wrapped.no_sync()
                if isinstance(wrapped, DistributedDataParallel) and not last
                else contextlib.nullcontext()
            )
            with waits:
                device = self.world.device.type
                with torch.autocast(device, torch.bfloat16, enabled=self.bf16), dropout:
                    sums = wrapped(batch)
                # Ranks are averaged where the step's mean needs their sum.
                losses = {
                    task: sums[task] * (self.world.size / max(counts[task], 1))
                    for task in self.tasks
                }
                self.weighting.backward(losses, share)
            log.add_losses(sums, counts if last else None, tokens)
        self.weighting.finish_step(self.world)
        norm = self._norm() if self.shared is None else self.shared.average()
        if not torch.isfinite(norm):
            raise self._not_finite(log.losses)
        self._clip(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        log.seconds += time.perf_counter() - started

    def _dropout(self) -> contextlib.AbstractContextManager[Any]:
        """Dropout as a function of (seed, step, rank), so that a resumed run repeats it."""
        place = [self.experiment.seed, self.state.step, self.world.rank]
        seeds = np.random.SeedSequence(place)
        seed = int(seeds.generate_state(1)[0])
        # torch.manual_seed keeps a stack trace for devices not yet in use: a millisecond a call.
        torch.default_generator.manual_seed(seed)
        if self.world.device.type == "cpu":
            return QuickDropout(seeds)
        torch.cuda.manual_seed(seed)
        return contextlib.nullcontext()

    def _micro_batch(self, rows: Rows) -> tuple[Batch, int]:
        """This rank's share of a batch; a rank left without rows gets one without its labels."""
        mine = deal(rows, self.train.lengths, self.world.rank, self.world.size)
        empty = len(mine) == 0
        if empty:
            mine = rows[:1]
        multiple = 8 if self.world.device.type == "cuda" else 1
        batch = collate(self.train, mine, self.pad_id, without_labels=empty, multiple_of=multiple)
        cache = self.caches.get("train")
        if cache is not None:
            batch = cache.attach(batch, self.train, mine)
        tokens = 0 if empty else int(self.train.lengths[mine].sum())
        return batch.to(self.world.device), tokens

    def _norm(self) -> Tensor:
        """() of the whole gradient."""
        groups = self.optimizer.param_groups
        found = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return optim.total_norm(found)

    def _clip(self, norm: Tensor) -> None:
        """Have the next optimiser step take a gradient of no more than the largest norm.

        The fused step divides by `grad_scale` as it reads the gradient; a pass of its own over it
        would take a few hundredths of a small encoder's step.
        """
        excess = norm / (self.experiment.optim.max_grad_norm or math.inf)
        self.optimizer.grad_scale = excess if excess > 1 else None  # type: ignore[attr-defined]

    def _not_finite(self, losses: Mapping[str, Tensor]) -> TrainingError:
        """All ranks come here together: the gradient that was not finite is the summed one."""
        sums = torch.stack([losses[task] for task in self.tasks])
        values = self.world.all_reduce(sums.to(self.world.device))
        bad = [t for t, v in zip(self.tasks, values.tolist(), strict=True) if not math.isfinite(v)]
        what = f"the loss of task {bad[0]!r}" if bad else "the gradient"
        return TrainingError(
            f"{what} is not finite at step {self.state.step + 1} (epoch {self.state.epoch + 1}). "
            "Lower optim.learning_rate, set training.precision: fp32, or set optim.max_grad_norm, "
            "and give the run a new name: this one's checkpoints go with its settings. "
            "The weights were not changed by this step; the last checkpoint is kept."
        )

    def _step_row(self, log: _StepLog, number: int, of: int, factor: float) -> dict[str, Any]:
        """A row for the log; the sums over ranks make it the same on all."""
        losses, tokens = log.reduced(self.world)
        state = self.state
        row: dict[str, Any] = {
            "step": state.step,
            "epoch": round(state.epoch + number / of, 4),
            "step_in_epoch": number,
            "steps_in_epoch": of,
            "learning_rate": factor * self.experiment.optim.learning_rate,
            "tokens_per_second": tokens / max(log.seconds, 1e-9),
        }
        row.update({f"loss/{task}": value for task, value in losses.items()})
        row.update(self.weighting.report())
        return row

    def _finish_epoch(self) -> Iterator[Event]:
        """Validate, keep the best weights, and ask for a checkpoint."""
        state = self.state
        self.weighting.end_epoch()
        state.epoch += 1
        state.part = 0
        row: dict[str, Any] = {"step": state.step, "epoch": float(state.epoch)}
        result = evaluate(
            self.model,
            self.data.splits["validation"],
            self.world,
            self.bf16,
            cache=self.caches.get("validation"),
            tasks=self.tasks,
        )
        row.update(result.flat("validation"))
        row["score"] = result.score(self.experiment.training.metric)
        state.update_best(row["score"])
        row["best"] = state.best_epoch == state.epoch
        yield Event("validation", row)
        yield Event("checkpoint", {"step": state.step})

    def out_of_patience(self) -> bool:
        patience = self.experiment.training.patience
        return patience is not None and self.state.epoch - self.state.best_epoch >= patience


class _StepLog:
    """Sums since the last progress event."""

    def __init__(self, tasks: list[str]) -> None:
        self.losses = {task: torch.zeros(()) for task in tasks}
        self.counts = dict.fromkeys(tasks, 0)
        self.tokens = 0
        self.seconds = 0.0

    def add_losses(
        self, sums: Mapping[str, Tensor], counts: Mapping[str, int] | None, tokens: int
    ) -> None:
        for task in self.losses:
            self.losses[task] = self.losses[task] + sums[task].detach().cpu()
            self.counts[task] += counts[task] if counts else 0
        self.tokens += tokens

    def reduced(self, world: World) -> tuple[dict[str, float], int]:
        """Mean loss a label of each task that was seen, and the tokens, over all ranks."""
        sums = torch.stack([*self.losses.values(), torch.tensor(float(self.tokens))]).double()
        values = world.all_reduce(sums.to(world.device)).tolist()
        losses = {
            task: value / self.counts[task]
            for task, value in zip(self.losses, values[:-1], strict=True)
            if self.counts[task]
        }
        return losses, int(values[-1])
