"""How training scales with workers: measured on this machine, predicted for clusters of GPUs.

MTL_DATA=… python -m benchmarks.scaling [--rounds 3]

The model of a step of W workers that each take b texts of a global batch of W·b:

    step = c · (overhead + slowest / speed) + 2 (W - 1) · (gradients / W / bandwidth + latency)

`slowest` is what the schedule itself deals to the rank with most tokens, averaged over steps; c is
how many workers share a core, 1 but on a machine with fewer cores than workers. The exchange is
that of a ring (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009), nothing of it hidden behind the backward pass, which is the worst case.

Overhead and speed are fitted to one worker at three batch sizes, latency and bandwidth to gloo's
all-reduce of two sizes; then two and four workers are predicted and measured. For GPUs the same
formula is used with the figures given as options: those are assumptions, not measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.train.slices import in_turn
from mtl_core.build import build_train_state
from mtl_core.config import load_experiment
from mtl_core.data.batching import Schedule, deal
from mtl_core.data.prepare import prepare

CONFIG = "train_jobs/configs/snips.yaml"
PER_WORKER = 32
"""Texts a worker takes in a step."""
SIZES = (16, 32, 64)
"""Batch sizes that one worker is fitted to."""
STEPS = 10
RESULT = Path("build/scaling.json")


@dataclass(frozen=True)
class Machine:
    """What a step depends on besides the data."""

    overhead: float
    """Seconds a step takes however small its batch is."""
    speed: float
    """Tokens a second beyond that, of one worker."""
    bandwidth: float
    """Bytes a second between two workers."""
    latency: float
    """Seconds a message takes at least."""
    cores: float = float("inf")
    """How many workers compute at the same time."""

    def step(self, workers: int, slowest: float, gradients: int) -> float:
        """Seconds of a step whose busiest worker has `slowest` tokens; `gradients` in bytes."""
        compute = max(1.0, workers / self.cores) * (self.overhead + slowest / self.speed)
        exchange = gradients / workers / self.bandwidth + self.latency
        return compute + 2 * (workers - 1) * exchange


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu-tokens", type=float, default=100_000, help="tokens/s of one GPU")
    parser.add_argument("--gpu-overhead", type=float, default=0.03, help="seconds a step")
    parser.add_argument("--gpu-batch", type=int, default=64, help="texts a GPU takes in a step")
    parser.add_argument("--link-gbit", type=float, default=10.0, help="between two nodes")
    parser.add_argument("--link-latency", type=float, default=50e-6, help="seconds")
    options = parser.parse_args()
    runs = {f"1 × {size}": (1, size) for size in SIZES}
    runs |= {f"{w} × {PER_WORKER}": (w, PER_WORKER * w) for w in (2, 4)}
    slices = in_turn({name: command(*run) for name, run in runs.items()}, options.rounds)
    measured = {
        name: statistics.median(one["seconds"] / STEPS for one in slices[name]) for name in runs
    }
    gradients = gradient_bytes()
    bandwidth, latency = all_reduce()
    overhead, speed = fit({size: measured[f"1 × {size}"] for size in SIZES})
    here = Machine(overhead, speed, bandwidth, latency, float(len(os.sched_getaffinity(0))))
    print(
        f"one thread: {1000 * overhead:.0f} ms a step and {speed:,.0f} tokens/s beyond; "
        f"gloo: {bandwidth / 1e6:,.0f} MB/s, {1e6 * latency:.0f} µs; "
        f"gradients of {gradients / 1e6:.1f} MB\n"
    )
    print("| workers × texts | measured ms a step | predicted | error |\n|---|---|---|---|")
    found = {}
    for name, (workers, batch) in runs.items():
        predicted = here.step(workers, slowest_tokens(workers, batch), gradients)
        found[name] = {"measured": measured[name], "predicted": predicted}
        error = 100 * (predicted / measured[name] - 1)
        print(f"| {name} | {1000 * measured[name]:.0f} | {1000 * predicted:.0f} | {error:+.0f} % |")
    gpu = Machine(
        options.gpu_overhead,
        options.gpu_tokens,
        options.link_gbit * 1e9 / 8,
        options.link_latency,
    )
    print("\n| GPUs | ms a step | efficiency | of it lost to uneven tokens |\n|---|---|---|---|")
    alone = gpu.step(1, slowest_tokens(1, options.gpu_batch), gradients)
    for workers in (1, 2, 4, 8, 16, 32, 64):
        batch = workers * options.gpu_batch
        slowest = slowest_tokens(workers, batch)
        step = gpu.step(workers, slowest, gradients)
        even = gpu.step(workers, mean_tokens(batch) / workers, gradients)
        print(
            f"| {workers} | {1000 * step:.1f} | {100 * alone / step:.0f} % "
            f"| {100 * (1 - even / step):.1f} % |"
        )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"here": vars(here), "steps": found}, indent=1) + "\n")


def command(workers: int, batch: int) -> list[str]:
    """This project's loop on so many workers of one thread, each as on a machine of its own."""
    settings = [f"training.batch_size={batch}", "freeze.embeddings=false"]
    sets = [word for setting in settings for word in ("--set", setting)]
    sizes = ["--steps", str(STEPS), "--workers", str(workers), "--threads", "1", "--sockets"]
    return [sys.executable, "-m", "benchmarks.train.ours", "--config", CONFIG, *sets, *sizes]


def fit(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Least squares of step = overhead + tokens / speed over batch sizes."""
    tokens = np.array([mean_tokens(size) for size in seconds])
    slope, overhead = np.polyfit(tokens, np.array(list(seconds.values())), 1)
    return float(overhead), float(1 / slope)


def dealt(workers: int, batch: int) -> list[list[float]]:
    """Tokens that each worker gets in each step of an epoch.

    The last step, of the texts that are left, counts as if it were full: with many workers an epoch
    has few steps.
    """
    experiment = load_experiment(CONFIG, [f"training.batch_size={batch}"])
    train = prepare(experiment).splits["train"]
    schedule = Schedule(train, experiment.mixing, batch, None, experiment.seed)
    lengths = train.lengths
    return [
        [
            int(lengths[deal(rows, lengths, rank, workers)].sum()) * batch / len(rows)
            for rank in range(workers)
        ]
        for rows in schedule.batches(0)
    ]


def slowest_tokens(workers: int, batch: int) -> float:
    return statistics.mean(max(tokens) for tokens in dealt(workers, batch))


def mean_tokens(batch: int) -> float:
    return statistics.mean(sum(tokens) for tokens in dealt(1, batch))


def gradient_bytes() -> int:
    """What workers exchange in a step: fp32 gradients of all that learns."""
    experiment = load_experiment(CONFIG, ["freeze.embeddings=false"])
    data = prepare(experiment)
    return 4 * sum(
        p.numel() for p in build_train_state(experiment, data).trainable_parameters().values()
    )


def all_reduce() -> tuple[float, float]:
    """Bandwidth in bytes/s and latency in s of gloo's all-reduce between two processes here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=_exchange, args=(rank, address, answers)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        codes = ", ".join(str(process.exitcode) for process in processes)
        sys.exit(f"the processes that measure gloo ended with {codes}")
    small, large, num_bytes = answers.get()
    # Two workers: a message in each of two phases, half of the bytes in each.
    return num_bytes / max(large - small, 1e-9), small / 2


def _exchange(rank: int, address: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=1)
    )
    seconds = []
    for numel in (16, 15_000_000):
        tensor = torch.ones(numel)
        taken = []
        for _ in range(12):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(tensor)
            taken.append(time.perf_counter() - started)
        seconds.append(statistics.median(taken[2:]))
    if rank == 0:
        answers.put((*seconds, 4 * numel))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
