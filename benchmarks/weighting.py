"""What a training step costs under each weighting strategy, relative to fixed weights.

MTL_DATA=… python benchmarks/weighting.py [--batch-size 32] [--rounds 10] [--steps 6]

Every strategy trains a model of its own on the same SNIPS batches, in turn.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from rounds import in_turn, ratios, steps
from transformers.utils.logging import disable_progress_bar

from mtl_core import loop
from mtl_core.config import Experiment, load_experiment
from mtl_core.data.prepare import prepare
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
    if options.rounds < 2:
        parser.error("--rounds: at least 2, which quartiles need")
    disable_progress_bar()
    loop.LOG_EVERY = options.steps
    size = f"training.batch_size={options.batch_size}"
    experiment = load_experiment(options.config, [size, "training.checkpoint_every=null"])
    data = prepare(experiment)
    runs = {name: steps(with_weighting(experiment, **v), data) for name, v in VARIANTS.items()}
    print(table(in_turn(runs, options.rounds, options.warm_up), options.steps))
    steps_text = f"{options.rounds} rounds of {options.steps} steps of {options.batch_size} texts"
    print(f"{steps_text}, {torch.get_num_threads()} threads, torch {torch.__version__}")


def with_weighting(experiment: Experiment, **changes: Any) -> Experiment:
    weighting = experiment.weighting.model_copy(update=changes)
    return experiment.model_copy(update={"weighting": weighting})


def table(seconds: dict[str, list[float]], steps: int) -> str:
    """Median of a step, and the rounds' ratios to fixed weights in the same round."""
    lines = ["| weighting | ms a step | × fixed, median | quartiles |", "|---|---|---|---|"]
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(ratios(values, seconds["fixed"]), n=4)
        milliseconds = 1000 * statistics.median(values) / steps
        lines.append(f"| {name} | {milliseconds:.0f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
