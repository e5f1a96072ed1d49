"""Training beside what users would pick instead; README.md beside this file says how it measures.

MTL_DATA=… python -m benchmarks.train [--only joint frozen] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.environments import environment
from benchmarks.train.slices import in_turn
from mtl_core.config import load_experiment
from mtl_core.data.prepare import Data, prepare
from mtl_core.data.tags import tag_names
from mtl_core.encoder import resolve_model

HERE = Path(__file__).parent
RESULT = Path("build/bench-train.json")
CONFIGS = {
    "snips": "train_jobs/configs/snips.yaml",
    "pair": "train_jobs/configs/banking77_wnut17.yaml",
}
ALL_LEARN = ("freeze.embeddings=false",)
LOWER_FOUR = ("freeze.layers=4",)
FROZEN = ("freeze.encoder=true",)


@dataclass(frozen=True)
class Contender:
    """One side of a comparison: a process that trains a slice when it is told to."""

    script: str
    arguments: tuple[str, ...] = ()
    steps: int = 20
    """Optimiser steps a slice."""
    passes: int = 1
    """How often a text goes through the encoder in an epoch."""
    packages: str = "trainers.txt"
    """What a peer's environment holds."""


def ours(*changes: str, workers: int = 1, steps: int = 20, sockets: bool = False) -> Contender:
    """This project's loop with some fields changed; each worker has its share of the CPUs."""
    words = [word for change in changes for word in ("--set", change)]
    words += ["--sockets"] if sockets else []
    return Contender("ours", (*words, "--workers", str(workers)), steps)


@dataclass(frozen=True)
class Comparison:
    """What is trained by whom; the first contender is ours, and `asked` of it stands by the others.

    A factor is the peer's time for an epoch over ours.
    """

    title: str
    data: str
    contenders: Mapping[str, Contender]
    asked: Mapping[str, float] = field(default_factory=dict)


COMPARISONS = {
    "joint": Comparison(
        "joint SNIPS, all parameters",
        "snips",
        {
            "ours": ours(*ALL_LEARN),
            "ours, fp32": ours(*ALL_LEARN, "training.precision=fp32"),
            "Trainer, fp32": Contender("hf_trainer"),
            "Trainer, bf16": Contender("hf_trainer", ("--bf16",)),
            # It sorts the texts of 50 batches at a time, so fewer would be all long or all short.
            "Trainer, bf16, by length": Contender("hf_trainer", ("--bf16", "--by-length"), 50),
            "plain loop": Contender("plain_loop", steps=6, passes=2),
            "flair": Contender("flair_trainer", steps=10, passes=2, packages="flair.txt"),
        },
        {"Trainer, fp32": 3.0, "Trainer, bf16, by length": 1.5, "plain loop": 8.0},
    ),
    "pair": Comparison(
        "BANKING77 with WNUT-17, all parameters",
        "pair",
        {"ours": ours(*ALL_LEARN), "Trainer, fp32": Contender("hf_trainer")},
        {"Trainer, fp32": 2.0},
    ),
    "frozen": Comparison(
        "joint SNIPS, encoder frozen, epochs after the first",
        "snips",
        {
            "ours": ours(*FROZEN, steps=400),
            "Trainer, fp32": Contender("hf_trainer", ("--frozen", "encoder")),
        },
        {"Trainer, fp32": 30.0},
    ),
    "lower-four": Comparison(
        "joint SNIPS, lower four of six layers and embeddings frozen, epochs after the first",
        "snips",
        {
            "ours": ours(*LOWER_FOUR),
            "Trainer, fp32": Contender("hf_trainer", ("--frozen", "4")),
        },
        {"Trainer, fp32": 3.0},
    ),
    "sentence": Comparison(
        "SNIPS intents alone, all parameters",
        "snips",
        {
            "ours": ours(
                *ALL_LEARN,
                "tasks={intent: {kind: classification}}",
                "data.0.columns={text: text, intent: label}",
            ),
            "sentence-transformers, fp32": Contender("sentence_trainer"),
            "sentence-transformers, bf16": Contender("sentence_trainer", ("--bf16",)),
        },
    ),
    "settings": Comparison(
        "joint SNIPS, all parameters, our own settings",
        "snips",
        {
            "32 texts a step": ours(*ALL_LEARN),
            "64 texts a step": ours(*ALL_LEARN, "training.batch_size=64"),
            "without dropout in the encoder": ours(*ALL_LEARN, "encoder.dropout=0.0"),
            "embeddings frozen": ours(),
        },
    ),
    "ddp": Comparison(
        "joint SNIPS, all parameters: two workers of a thread against one of two",
        "snips",
        {
            "two workers": ours(*ALL_LEARN, workers=2),
            "two workers, over sockets": ours(*ALL_LEARN, workers=2, sockets=True),
            "one worker": ours(*ALL_LEARN),
        },
        {"one worker": 0.85},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name in options.only:
        comparison = COMPARISONS[name]
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(comparison, options.rounds, Path(folder))
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print("\n".join(table(comparison, results[name])), end="\n\n", flush=True)


def measure(comparison: Comparison, rounds: int, folder: Path) -> dict[str, Any]:
    """Per contender what each round's slice took; the order turns from round to round."""
    config = CONFIGS[comparison.data]
    data = prepare(load_experiment(config))
    rows = folder / "rows.npz"
    write_rows(rows, data)
    commands = {
        name: command(contender, config, data, rows, ["training.batch_size=32"])
        for name, contender in comparison.contenders.items()
    }
    tokens = int(data.splits["train"].lengths.sum())
    return {"tokens": tokens, "slices": in_turn(commands, rounds)}


def write_rows(path: Path, data: Data, name: str = "train") -> None:
    """The texts of a split for contenders that know nothing of this project."""
    split = data.splits[name]
    intent, tags = (task for task in sorted(split.targets, key=lambda name: name != "intent"))
    np.savez(
        path,
        input_ids=split.input_ids,
        starts=split.starts,
        intent=split.targets[intent],
        tags=split.targets[tags],
    )


def command(
    contender: Contender,
    config: str,
    data: Data,
    rows: Path,
    changes: Sequence[str],
    python: str | None = None,
) -> list[str]:
    """The command line of a contender; peers have an environment of their own if none is given."""
    steps = ["--steps", str(contender.steps)]
    if contender.script == "ours":
        settings = [word for change in changes for word in ("--set", change)]
        module = [sys.executable, "-m", "benchmarks.train.ours", "--config", config]
        return [*module, *settings, *contender.arguments, *steps]
    python = python or str(environment(HERE / contender.packages) / "bin/python")
    encoder = resolve_model(load_experiment(config).encoder.model)
    sizes = []
    if contender.script != "sentence_trainer":
        (tagged,) = (name for name in data.labels if name != "intent")
        sizes = ["--intents", str(len(data.labels["intent"]))]
        sizes += ["--tags", str(len(tag_names(data.labels[tagged])))]
    script = [python, str(HERE / f"{contender.script}.py")]
    return [
        *script,
        "--rows",
        str(rows),
        "--encoder",
        encoder,
        *sizes,
        *contender.arguments,
        *steps,
    ]


def table(comparison: Comparison, result: Mapping[str, Any]) -> list[str]:
    """Markdown: real tokens a second, an epoch's seconds, the factor of each round, memory."""
    lines = [
        f"| {comparison.title} | real tokens/s | an epoch | time / ours | asked | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    epochs = {
        name: [
            one["seconds"] / one["tokens"] * result["tokens"] * contender.passes
            for one in result["slices"][name]
        ]
        for name, contender in comparison.contenders.items()
    }
    first = next(iter(epochs.values()))
    for name, seconds in epochs.items():
        slices = result["slices"][name]
        rate = median(one["tokens"] / one["seconds"] for one in slices)
        ratios = [theirs / mine for theirs, mine in zip(seconds, first, strict=True)]
        factor = f"{median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"
        asked = comparison.asked.get(name)
        cells = [
            name,
            f"{rate:,.0f}",
            f"{median(seconds):.1f} s",
            "" if seconds is first else factor,
            f"{asked:g} ×" if asked else "",
            f"{max(one['peak_mb'] for one in slices):,.0f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
