"""What a sweep of heads on a frozen encoder costs beside one such training with its feature pass.

MTL_DATA=… python benchmarks/frozen_sweep.py [--trials 16]

Both start with an empty cache. Every trial trains the two heads of SNIPS; only the first needs the
encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import yaml


def sweep(trials: int, folder: Path) -> tuple[dict[str, Any], pd.DataFrame, float]:
    """Run a sweep with a cache of its own: its summary, its trials, the whole command's seconds."""
    name = f"heads-{trials}"
    content = {
        "name": name,
        "base": str(Path("train_jobs/configs/snips.yaml").resolve()),
        "set": {"freeze": {"encoder": True}},
        "space": {
            "optim.head_learning_rate": {"loguniform": [1e-3, 3e-2]},
            "tasks.*.dropout": {"uniform": [0.0, 0.4]},
        },
        "budget": {"trials": trials},
        "seeds": 1,
        "output_dir": str(folder),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    environment = {**os.environ, "MTL_CACHE": str(folder / f"cache-{trials}")}
    command = [sys.executable, "-m", "train_jobs.tune", "--config", str(path)]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    seconds = time.monotonic() - started
    summary = json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))
    table = pd.read_csv(folder / name / "trials.csv")
    search = table[table["phase"] == "search"]
    if len(search) != trials or (search["status"] != "finished").any():
        sys.exit(f"{name}: not every trial finished: {', '.join(search['status'])}")
    return summary, search, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        _, one, _ = sweep(1, Path(temporary))
        summary, many, command = sweep(options.trials, Path(temporary))
    alone, search = one["seconds"].sum(), summary["seconds"]["search"]
    print("| measure | seconds |\n|---|---|")
    print(f"| one training with its feature pass | {alone:.1f} |")
    print(f"| {options.trials} trials, from the first to the last | {search:.1f} |")
    print(f"| the same, summed over trials | {many['seconds'].sum():.1f} |")
    print(f"| median of a trial | {many['seconds'].median():.1f} |")
    print(f"| the whole command, with Ray's start and the best one once more | {command:.1f} |")
    print(f"\nratio of sweep to one training: {search / alone:.2f}")


if __name__ == "__main__":
    main()
