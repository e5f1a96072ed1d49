"""What a run costs beside training, and a server beside answering: seconds to begin and to end.

    python benchmarks/startup.py --runs 5

trains the demo for one epoch with the command that users run and serves the artifact, each after a
time that fills the caches, and prints median, least and most. What comes after the last step holds
the scoring of both splits.
"""

from __future__ import annotations

import argparse
import signal
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


def serve(artifact: str) -> dict[str, float]:
    """Start a server, and stop it once it is ready."""
    command = [sys.executable, "-m", "serve_app", "--artifact", artifact, "--port", "0"]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not any(line.startswith("ready: ") for line in process.stdout):
            sys.exit(process.wait())
        ready = time.monotonic()
        time.sleep(1)
        stopped = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    return {
        "until a server is ready": ready - begin,
        "from Ctrl-C to its end": time.monotonic() - stopped,
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
        servers = [serve(f"{folder}/run-0/artifact") for _ in range(options.runs + 1)][1:]
    for series in (runs, servers):
        for part in series[0]:
            seconds = [run[part] for run in series]
            middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
            print(f"{part:<30} {middle:6.1f} s ({least:.1f} to {most:.1f})")


if __name__ == "__main__":
    main()
