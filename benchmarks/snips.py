"""SNIPS, intents and slots from one encoder pass: test scores over three seeds and the time a run.

MTL_DATA=… python benchmarks/snips.py [--seeds 1 2 3]
"""

from __future__ import annotations

import argparse

from seed_runs import over_seeds, score, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="train_jobs/configs/snips.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    runs = over_seeds(options.config, options.seeds, *options.set, name="snips")
    print("| seed | intent accuracy | slot F1 | seconds |\n|---|---|---|---|")
    for seed, run in zip(options.seeds, runs, strict=True):
        intent, slots = score(run, "intent", "accuracy"), score(run, "slots", "f1")
        print(f"| {seed} | {intent:.2f} | {slots:.2f} | {run['command_seconds']:.0f} |")
    intents = [score(run, "intent", "accuracy") for run in runs]
    slots = [score(run, "slots", "f1") for run in runs]
    print(f"\nintent accuracy {spread(intents)}, slot F1 {spread(slots)}")


if __name__ == "__main__":
    main()
