"""Train an experiment over seeds with the command users run, and tabulate its scores."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def train(config: str, seed: int, output_dir: str, *changes: str, name: str = "run") -> Any:
    """Run train_jobs.train; returns the manifest with the seconds the whole command took."""
    settings = [f"seed={seed}", f"name={name}-{seed}", f"output_dir={output_dir}", *changes]
    command = [sys.executable, "-m", "train_jobs.train", "--config", config]
    for setting in settings:
        command += ["--set", setting]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=sys.stderr)
    seconds = time.monotonic() - started
    path = Path(output_dir) / f"{name}-{seed}" / "artifact" / "manifest.json"
    return {**json.loads(path.read_text(encoding="utf-8")), "command_seconds": seconds}


def over_seeds(config: str, seeds: Sequence[int], *changes: str, name: str = "run") -> list[Any]:
    """One run a seed, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return [train(config, seed, folder, *changes, name=name) for seed in seeds]


def score(manifest: Any, task: str, metric: str, split: str = "test") -> float:
    return 100 * float(manifest["tasks"][task]["metrics"][split][metric])


def spread(values: Sequence[float]) -> str:
    """Mean and range, as tables show it."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
