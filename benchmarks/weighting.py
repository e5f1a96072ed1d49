"""What a training step costs under each weighting strategy, relative to fixed weights.

MTL_DATA=… python benchmarks/weighting.py [--batch-size 32] [--rounds 10] [--steps 6]

Every strategy trains a model of its own on the same SNIPS batches, in turn: a round gives each the
same number of steps, another one first each time, so that whatever else the machine does befalls
all of them alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from mtl_core import loop
from mtl_core.build import build_model, fit_to_data
from mtl_core.config import Experiment, load_experiment
from mtl_core.data.prepare import Data, prepare
from mtl_core.loop import fit
from mtl_core.state import TrainState
from mtl_core.weighting import STRATEGIES

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"strategy": name} for name in STRATEGIES},
    "fixed, cosines in every step": {"strategy": "fixed", "gradient_cosines": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="train_jobs/configs/snips.yaml")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6, help="steps a round")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that do not count")
    options = parser.parse_args()
    disable_progress_bar()
    loop.LOG_EVERY = options.steps
    size = f"training.batch_size={options.batch_size}"
    experiment = load_experiment(options.config, [size, "training.checkpoint_every=null"])
    data = prepare(experiment)
    runs = {name: steps(experiment, data, changes) for name, changes in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.warm_up + options.rounds):
        first = number % len(runs)
        for name in [*runs][first:] + [*runs][:first]:
            taken = next(runs[name]) / options.steps
            if number >= options.warm_up:
                seconds[name].append(taken)
    print(table(seconds))
    steps_text = f"{options.rounds} rounds of {options.steps} steps of {options.batch_size} texts"
    print(f"{steps_text}, {torch.get_num_threads()} threads, torch {torch.__version__}")


def steps(experiment: Experiment, data: Data, changes: dict[str, Any]) -> Iterator[float]:
    """Seconds between two progress events of a run with this weighting, one after the other."""
    weighting = experiment.weighting.model_copy(update=changes)
    experiment = experiment.model_copy(update={"weighting": weighting})
    model = build_model(experiment, data.labels)
    fit_to_data(model, experiment, data.splits["train"])
    run = fit(TrainState(model, experiment), data, experiment)
    while True:
        started = time.perf_counter()
        event = next(run)
        assert event.kind == "step", "the epoch is too short for so many rounds"
        yield time.perf_counter() - started


def table(seconds: dict[str, list[float]]) -> str:
    """Median of a step, and the rounds' ratios to fixed weights in the same round."""
    lines = ["| weighting | ms a step | × fixed, median | quartiles |", "|---|---|---|---|"]
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["fixed"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = 1000 * statistics.median(values)
        lines.append(f"| {name} | {milliseconds:.0f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
