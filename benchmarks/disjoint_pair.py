"""BANKING77 and WNUT-17 with one encoder, against each alone with the same budget.

    MTL_DATA=… python benchmarks/disjoint_pair.py [--seeds 1]

The budget of a task is its own number of epochs over its own rows: the joint run goes through the
rows of both as often as each single run goes through its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml
from seed_runs import over_seeds, score, spread

CONFIG = Path("train_jobs/configs/banking77_wnut17.yaml")
METRICS = {"intent": "accuracy", "entities": "f1"}


def alone(task: str, folder: str) -> str:
    """The experiment file with one task and its source left."""
    raw: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    raw["tasks"] = {task: raw["tasks"][task]}
    raw["data"] = [source for source in raw["data"] if task in source["columns"]]
    path = Path(folder) / f"{task}.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    together = over_seeds(str(CONFIG), options.seeds, *options.set, name="pair")
    print("| task | metric | together | alone | difference |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for task, metric in METRICS.items():
            single = over_seeds(alone(task, folder), options.seeds, *options.set, name=task)
            ours = [score(run, task, metric) for run in together]
            theirs = [score(run, task, metric) for run in single]
            gap = sum(ours) / len(ours) - sum(theirs) / len(theirs)
            print(f"| {task} | {metric} | {spread(ours)} | {spread(theirs)} | {gap:+.2f} |")


if __name__ == "__main__":
    main()
