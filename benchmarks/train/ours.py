"""This project's training, as each of its workers runs it: mtl_core.loop.fit."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from benchmarks.train.pace import Pace
from mtl_core import loop
from mtl_core.build import build_train_state
from mtl_core.config import load_experiment
from mtl_core.data.batching import Schedule
from mtl_core.data.prepare import prepare
from mtl_core.loop import fit
from mtl_core.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--sockets", action="store_true", help="exchange gradients as between machines"
    )
    parser.add_argument("--profile", action="store_true", help="of a slice, and nothing else")
    parser.add_argument("--threads", type=int, help="of a worker; its share of the CPUs if absent")
    options = parser.parse_args()
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.workers)
    words = {"config": options.config, "changes": options.set, "steps": options.steps}
    train = partial(worker, threads=threads, sockets=options.sockets, **words)
    if options.profile:
        train(0, pace_class=ProfilingPace)
        return
    if options.workers == 1:
        train(0)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    context = torch.multiprocessing.get_context("spawn")
    group = {"size": options.workers, "address": address}
    others = [
        context.Process(target=partial(train, **group), args=(rank,), daemon=True)
        for rank in range(1, options.workers)
    ]
    for process in others:
        process.start()
    train(0, **group)


class ProfilingPace(Pace):
    """Goes through three slices unasked, and prints where the time of the third one goes."""

    slices = 0

    def _wait(self) -> None:
        self.slices += 1
        if self.slices == 3:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if self.slices == 4:
            self.profiler.stop()
            averages = self.profiler.key_averages()
            print(averages.table(sort_by="self_cpu_time_total", row_limit=25))
            sys.exit(0)
        self.skip()


def worker(
    rank: int,
    config: str,
    changes: Sequence[str],
    steps: int,
    threads: int,
    size: int = 1,
    address: str | None = None,
    sockets: bool = False,
    pace_class: type[Pace] = Pace,
) -> None:
    """Train without end; the first rank keeps the pace, and the others wait for it in each step."""
    disable_progress_bar()
    torch.set_num_threads(threads)
    if sockets:
        loop.SharedGradients.open = lambda *arguments: None  # type: ignore[method-assign]
    if address is not None:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    experiment = load_experiment(config, ["training.epochs=1000", *changes])
    data = prepare(experiment)
    train = data.splits["train"]
    loop.LOG_EVERY = steps
    run = fit(build_train_state(experiment, data), data, experiment, World(rank, size, rank))
    limits = (experiment.training.batch_size, experiment.training.batch_tokens)
    schedule = Schedule(train, experiment.mixing, *limits, experiment.seed)

    def tokens_of(epoch: int) -> list[int]:
        return [int(train.lengths[rows].sum()) for rows in schedule.batches(epoch)]

    epoch, done, tokens = 0, 0, tokens_of(0)
    if rank:
        with contextlib.suppress(RuntimeError):  # the first rank was stopped: enough was measured
            for _ in run:
                pass
        return
    pace = pace_class(steps)
    for event in run:
        if event.kind != "step":
            pace.skip()
            continue
        now = event.row["step_in_epoch"]
        if now <= done:
            epoch, done, tokens = epoch + 1, 0, tokens_of(epoch + 1)
        pace.step(sum(tokens[done:now]), now - done)
        done = now


if __name__ == "__main__":
    main()
