"""What a corpus costs before the first step, and in memory: read whole, or a shard at a time.

    python benchmarks/corpus_size.py --rows 50000 500000 5000000

writes made-up rows (the demo's texts, numbered, so that no two are alike), trains on them with the
command that users run and one worker, and ends it when the third shard has been taken up, or when
the first steps are done. Memory is what a process has for itself (USS), at its highest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil

from mtl_core.data.demo import ENTITY_TYPES, SENTIMENTS, demo_corpus

CONFIG = "train_jobs/configs/demo.yaml"
WORKER = "RayTrainWorker"
NUMBER = "{number}"


@dataclass
class Measured:
    """One training, as far as it was followed."""

    seconds: float = 0.0
    """From the command to its first ten steps."""
    driver: float = 0.0
    """Its memory in MB until then, at its highest."""
    worker: dict[int, float] = field(default_factory=dict)
    """Shard taken up last → the worker's memory in MB, at its highest."""


def write(path: Path, rows: int) -> None:
    """So many rows with a sentiment, entities or both, as JSON lines."""
    templates = []
    for example in demo_corpus()["train"]:
        row: dict[str, Any] = {"text": f"{example.text} {NUMBER}", **example.targets}
        if (entities := example.targets.get("entities")) is not None:
            row["entities"] = [span._asdict() for span in entities]  # type: ignore[union-attr]
        templates.append((json.dumps(row) + "\n").split(NUMBER))
    with path.open("w", encoding="utf-8") as file:
        for number, (before, after) in zip(range(rows), cycle(templates), strict=False):
            file.write(f"{before}{number}{after}")


def measure(corpus: Path, shard_texts: int | None, folder: Path) -> Measured:
    """Train with an empty cache until memory and start are known."""
    source = {
        "path": str(corpus),
        "columns": {name: name for name in ("text", "sentiment", "entities")},
        "validation_fraction": 1000 / int(corpus.stem),
    }
    changes = {
        "output_dir": folder,
        "data": json.dumps([source]),
        "tasks.sentiment.labels": json.dumps(SENTIMENTS),
        "tasks.entities.labels": json.dumps(ENTITY_TYPES),
        "training.epochs": 1,
        "scale.workers": 1,
        "training.shard_texts": "null" if shard_texts is None else shard_texts,
    }
    command = [sys.executable, "-m", "train_jobs.train", "--config", CONFIG]
    for name, value in changes.items():
        command += ["--set", f"{name}={value}"]
    measured, started = Measured(), time.monotonic()
    env = {**os.environ, "MTL_CACHE": str(folder / "cache")}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        for driver, worker in memory(process):
            rows = told(folder)
            shard = max((row.get("shard", 0) for row in rows), default=0)
            measured.worker[shard] = max(worker, measured.worker.get(shard, 0.0))
            if not measured.seconds:
                measured.driver = max(measured.driver, driver)
                if any(row["event"] == "step" for row in rows):
                    measured.seconds = time.monotonic() - started
            steps = sum(row["event"] == "step" for row in rows)
            if shard >= 3 if shard_texts else steps >= 20:
                process.send_signal(signal.SIGINT)
                process.wait(60)
                break
        else:  # by itself
            if process.wait() or not measured.seconds:
                sys.exit(f"training ended with {process.returncode}")
    return measured


def memory(process: subprocess.Popen[bytes]) -> Iterator[tuple[float, float]]:
    """MB of the driver and of its worker, again and again while the command runs."""
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            started = driver.children(recursive=True)
            workers = [p for p in started if WORKER in " ".join(p.cmdline())]
            sizes = [p.memory_full_info().uss / 2**20 for p in workers]
            yield driver.memory_full_info().uss / 2**20, max(sizes, default=0.0)
        except psutil.Error:
            continue
        time.sleep(0.5)


def told(folder: Path) -> list[dict[str, Any]]:
    path = folder / "demo" / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 500_000, 5_000_000])
    parser.add_argument("--shard-texts", type=int, default=10_000)
    parser.add_argument("--whole-up-to", type=int, default=500_000, help="rows to read whole")
    options = parser.parse_args()
    shards = f"shards of {options.shard_texts:,}"
    print("| rows | read | first ten steps after | driver until then | worker |")
    print("|---|---|---|---|---|")
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder, f"{rows}.jsonl")
            write(corpus, rows)
            ways: list[int | None] = [options.shard_texts]
            if rows <= options.whole_up_to:
                ways.insert(0, None)
            for way in ways:
                with tempfile.TemporaryDirectory() as runs:
                    found = measure(corpus, way, Path(runs))
                worker = ", ".join(f"{found.worker[shard]:,.0f}" for shard in sorted(found.worker))
                read = shards if way else "whole"
                figures = f"{found.seconds:.1f} s | {found.driver:,.0f} MB | {worker} MB"
                print(f"| {rows:,} | {read} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
