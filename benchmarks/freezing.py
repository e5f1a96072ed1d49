"""What to freeze, how fast to learn, how to weigh tasks, when there are few training rows.

    MTL_DATA=… python benchmarks/freezing.py --case snips-500 [--vary freezing] [--seeds 1 2 3]

Training and scoring are those of a run, without what each pays for Ray's start, checkpoints and
pictures. Every run has an empty cache. `--results FILE` keeps a line a run and repeats none that is
there, so that a long table can be measured in parts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from disjoint_pair import alone
from seed_runs import spread
from transformers.utils.logging import disable_progress_bar

from mtl_core.build import build_train_state
from mtl_core.config import load_experiment
from mtl_core.data.prepare import prepare
from mtl_core.evaluation import evaluate
from mtl_core.loop import fit

SNIPS = {"intent": "accuracy", "slots": "f1"}
FEW_TO_VALIDATE = "data.0.validation_fraction=0.025"  # 250 texts, after every epoch
ALIKE = ["tasks.intent.loss_weight=1", "tasks.slots.loss_weight=1"]
CASES: dict[str, tuple[dict[str, str], list[str]]] = {
    "snips-500": (SNIPS, [*ALIKE, "data.0.limit=500", "training.epochs=8"]),
    "snips-2000": (SNIPS, [*ALIKE, "data.0.limit=2000", "training.epochs=4"]),
    "banking77-770": (
        {"intent": "accuracy"},
        ["data.0.limit=770", "training.epochs=12", FEW_TO_VALIDATE],
    ),
}
"""Name → metric of each task, and the settings of all its runs."""
ALL = [
    "training.batch_size=32",
    "freeze.embeddings=false",
    "optim.learning_rate=5e-4",
    "optim.head_learning_rate=1e-3",
    "optim.layer_decay=1",
]
HEADS = ["freeze.encoder=true", "training.epochs=30", "optim.head_learning_rate=0.01"]
VARIANTS: dict[str, dict[str, list[str]]] = {
    "freezing": {
        "all parameters": [],
        "embeddings frozen": ["freeze.embeddings=true"],
        "lower 2 layers frozen": ["freeze.layers=2"],
        "lower 4 layers frozen": ["freeze.layers=4"],
        "gradual unfreezing": ["freeze.unfreeze_every=1"],
        "layer_decay 0.8": ["optim.layer_decay=0.8"],
        "encoder frozen": HEADS,
        "encoder frozen, hidden_size 256": [*HEADS, "tasks.*.hidden_size=256"],
    },
    "rates": {
        f"learning_rate {rate}": [f"optim.learning_rate={rate}"]
        for rate in ("5e-5", "1e-4", "2e-4", "5e-4", "1e-3", "2e-3")
    },
    "weighting": {
        strategy: [f"weighting.strategy={strategy}"]
        for strategy in ("fixed", "uncertainty", "dwa", "rlw", "pcgrad")
    },
}
"""What is varied → name of a variant → its settings, on top of the case's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="snips-500")
    parser.add_argument("--vary", choices=VARIANTS, default="freezing")
    parser.add_argument("--only", nargs="+", help="some of the variants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--results", help="file that keeps a JSON line a run")
    options = parser.parse_args()
    names = options.only or list(VARIANTS[options.vary])
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(options.results or f"{folder}/results.jsonl")
        for seed in options.seeds:  # seeds outside: other work befalls all variants alike
            for name in names:
                key = [options.case, options.vary, name, seed]
                if not any(row["key"] == key for row in read(results)):
                    row = {"key": key, **measure(options.case, options.vary, name, seed)}
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
        print(table(options.case, options.vary, names, options.seeds, read(results)))
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads (OMP_NUM_THREADS)")


def measure(case: str, vary: str, variant: str, seed: int) -> dict[str, Any]:
    """Test scores of one training, in percent, and its seconds."""
    metrics, settings = CASES[case]
    changes = [f"seed={seed}", *ALL, *settings]
    for change in VARIANTS[vary][variant]:
        changes += [change.replace("*", task) for task in metrics] if "*" in change else [change]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MTL_CACHE"] = folder
        banking = case.startswith("banking77")
        config = alone("intent", folder) if banking else "train_jobs/configs/snips.yaml"
        experiment = load_experiment(config, changes)
        data = prepare(experiment)
        started = time.perf_counter()
        state = build_train_state(experiment, data)
        for _ in fit(state, data, experiment):
            pass
        seconds = time.perf_counter() - started
        scores = evaluate(state.model, data.splits["test"]).scores()
    return {
        "scores": {task: 100 * scores[task][metric] for task, metric in metrics.items()},
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "steps": state.step,
        "best_epoch": state.best_epoch,
        "sizes": {name: len(split) for name, split in data.splits.items()},
    }


def read(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def table(
    case: str, vary: str, names: list[str], seeds: list[int], rows: list[dict[str, Any]]
) -> str:
    """Mean and range of each variant's scores over seeds, and its median seconds to train."""
    metrics, _ = CASES[case]
    titles = [f"{task} {metric}" for task, metric in metrics.items()]
    lines = [f"| {vary} | {' | '.join(titles)} | seconds |", "|---" * (len(titles) + 2) + "|"]
    for name in names:
        keys = [[case, vary, name, seed] for seed in seeds]
        runs = [row for row in rows if row["key"] in keys]
        cells = [spread([run["scores"][task] for run in runs]) for task in metrics]
        seconds = statistics.median(run["seconds"] for run in runs)
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
