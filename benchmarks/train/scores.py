"""How soon a score is reached, and what it ends at: joint SNIPS, over seeds.

    MTL_DATA=… python -m benchmarks.train.scores --epochs 3 --seeds 1 2 3

Ours and transformers' Trainer in turn, one process each, so many epochs of 32 texts a batch from
the same encoder, all parameters. Seconds are those of training: evaluation and loading are left
out. Peers' predictions are scored here as ours are, by words, with seqeval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from seqeval.metrics import f1_score
from transformers.utils.logging import disable_progress_bar

from benchmarks.train.__main__ import ALL_LEARN, CONFIGS, Contender, command, write_rows
from mtl_core.build import build_train_state
from mtl_core.config import load_experiment
from mtl_core.data.encoding import EncodedSplit
from mtl_core.data.prepare import Data, prepare
from mtl_core.data.tags import tag_names
from mtl_core.evaluation import evaluate
from mtl_core.loop import fit

CONFIG = CONFIGS["snips"]
PEERS = {
    "Trainer, fp32": Contender("hf_trainer"),
    "Trainer, bf16, by length": Contender("hf_trainer", ("--bf16", "--by-length")),
}


@dataclass(frozen=True)
class Epoch:
    """Where a contender stands after an epoch."""

    seconds: float
    """Trained so far."""
    intent: float
    slots: float
    """Validation accuracy and F1, in percent."""


@dataclass(frozen=True)
class Run:
    """One training: its epochs, and the test scores of what it leaves."""

    epochs: list[Epoch]
    intent: float
    slots: float


def ours(changes: Sequence[str]) -> Run:
    """Train in this process."""
    disable_progress_bar()
    experiment = load_experiment(CONFIG, changes)
    data = prepare(experiment)
    state = build_train_state(experiment, data)
    epochs, seconds, since = [], 0.0, time.perf_counter()
    for event in fit(state, data, experiment):
        now = time.perf_counter()
        if event.kind == "step":
            seconds += now - since
        elif event.kind == "validation":
            row = event.row
            scores = row["validation/intent/accuracy"], row["validation/slots/f1"]
            epochs.append(Epoch(seconds, *(100 * score for score in scores)))
        since = time.perf_counter()
    scores = evaluate(state.model, data.splits["test"]).scores()
    return Run(epochs, 100 * scores["intent"]["accuracy"], 100 * scores["slots"]["f1"])


def peer(contender: Contender, data: Data, epochs: int, seed: int, folder: Path) -> Run:
    """Train in the peer's environment, and score what it wrote."""
    rows = {name: folder / f"{name}.npz" for name in ("train", "validation", "test")}
    for name, path in rows.items():
        write_rows(path, data, name)
    words = command(contender, CONFIG, data, rows["train"], [])
    words += ["--epochs", str(epochs), "--seed", str(seed), "--predict"]
    words += [str(rows["validation"]), str(rows["test"]), str(folder)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"epoch"')]
    names = tag_names(data.labels["slots"])

    def score(split: str, epoch: int) -> tuple[float, float]:
        found = np.load(folder / f"{split}-{epoch}.npz")
        return scored(data.splits[split], found["intent"], found["tags"], names)

    after = [Epoch(row["seconds"], *score("validation", row["epoch"])) for row in told]
    best = max(zip(after, told, strict=True), key=lambda pair: pair[0].intent + pair[0].slots)
    return Run(after, *score("test", best[1]["epoch"]))


def scored(
    split: EncodedSplit, intents: np.ndarray, tags: np.ndarray, names: Sequence[str]
) -> tuple[float, float]:
    """Accuracy, and F1 of the words' tags, a word having that of its first sub-word, in percent."""
    gold, said = [], []
    for row in range(len(split)):
        words = slice(split.word_starts[row], split.word_starts[row + 1])
        first = split.word_tokens[words]
        found = tags[split.starts[row] + np.maximum(first, 0)]
        said.append([names[tag] if at >= 0 else "O" for tag, at in zip(found, first, strict=True)])
        gold.append([names[tag] for tag in split.word_tags["slots"][words]])
    accuracy = float((intents == split.targets["intent"]).mean())
    return 100 * accuracy, 100 * float(f1_score(gold, said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--intent", type=float, default=97.5, help="accuracy to reach")
    parser.add_argument("--slots", type=float, default=90.0, help="F1 to reach, with it")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = [*ALL_LEARN, "training.batch_size=32", f"training.epochs={options.epochs}"]
    if options.one:  # a process of its own, as every contender is
        run = ours([*settings, f"seed={options.seeds[0]}"])
        print(json.dumps([[vars(e) for e in run.epochs], run.intent, run.slots]))
        return
    data = prepare(load_experiment(CONFIG, settings))
    runs: dict[str, list[Run]] = {name: [] for name in ("ours", *PEERS)}
    for seed in options.seeds:
        words = ["--epochs", str(options.epochs), "--seeds", str(seed), "--one"]
        module = [sys.executable, "-m", "benchmarks.train.scores", *words]
        done = subprocess.run(module, check=True, stdout=subprocess.PIPE, text=True)
        epochs, intent, slots = json.loads(done.stdout.splitlines()[-1])
        runs["ours"].append(Run([Epoch(**epoch) for epoch in epochs], intent, slots))
        for name, contender in PEERS.items():
            with tempfile.TemporaryDirectory() as folder:
                run = peer(contender, data, options.epochs, seed, Path(folder))
            runs[name].append(run)
        for name, found in runs.items():
            print(f"seed {seed}, {name}: {found[-1]}", file=sys.stderr)
        print("\n".join(table(runs, options.intent, options.slots)), end="\n\n", flush=True)


def table(runs: dict[str, list[Run]], intent: float, slots: float) -> list[str]:
    """Markdown: seconds to the score, its factor, and what each ends at."""
    lines = [
        f"| {len(runs['ours'])} seeds | to {intent:g} and {slots:g} | time / ours | all epochs "
        "| test intent accuracy | test slot F1 |",
        "|---|---|---|---|---|---|",
    ]
    mine = [to_score(run, intent, slots) for run in runs["ours"]]
    for name, found in runs.items():
        reached = [to_score(run, intent, slots) for run in found]
        factors = [a / b for a, b in zip(reached, mine, strict=True) if a and b]
        times = [seconds for seconds in reached if seconds]
        never = f", {len(found) - len(times)} never" if len(times) < len(found) else ""
        cells = [
            name,
            f"{spread(times)} s{never}",
            f"{spread(factors, 2)} ×" if name != "ours" else "",
            f"{spread([run.epochs[-1].seconds for run in found])} s",
            spread([run.intent for run in found], 2),
            spread([run.slots for run in found], 2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def to_score(run: Run, intent: float, slots: float) -> float | None:
    """Seconds of training until both scores were reached; None if they were not."""
    after = (e.seconds for e in run.epochs if e.intent >= intent and e.slots >= slots)
    return next(after, None)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, least and most."""
    if not values:
        return "–"
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


if __name__ == "__main__":
    main()
