"""What a run costs beside training: seconds to its first step, and from its last to its end.

    python benchmarks/startup.py --runs 5

trains the demo for one epoch with the command that users run, after a run that fills the caches,
and prints median, least and most. What comes after the last step holds the scoring of both splits.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

CONFIG = "train_jobs/configs/demo.yaml"


def run(folder: str, *changes: str) -> dict[str, float]:
    """Train once; the seconds of the run's three parts, as its output tells them."""
    command = [sys.executable, "-u", "-m", "train_jobs.train", "--config", CONFIG]
    for change in (f"output_dir={folder}", "training.epochs=1", *changes):
        command += ["--set", change]
    moments = {"begin": time.monotonic()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for moment, words in (("first step", "worker(s) on"), ("last step", "validation: ")):
                if words in line and "texts (" not in line:
                    moments[moment] = time.monotonic()
    if process.returncode:
        sys.exit(process.returncode)
    moments["end"] = time.monotonic()
    return {
        "to the first step": moments["first step"] - moments["begin"],
        "steps": moments["last step"] - moments["first step"],
        "from the last step to the end": moments["end"] - moments["last step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            run(folder, f"name=run-{number}", *options.set) for number in range(options.runs + 1)
        ][1:]
    for part in runs[0]:
        seconds = [run[part] for run in runs]
        middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
        print(f"{part:<30} {middle:6.1f} s ({least:.1f} to {most:.1f})")


if __name__ == "__main__":
    main()
