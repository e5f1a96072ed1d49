"""What the FastAPI peer gives under each of its settings, one after the other on an idle machine.

    python -m benchmarks.serve.peer_settings [--rounds 3] [--seconds 6]

prints medians over rounds: requests a second with 32 connections, median latency with one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from benchmarks.serve import artifacts, corpus, servers
from benchmarks.serve.plan import LOADS
from benchmarks.serve.wrk import LoadError, Sample, drive, require_wrk, warm_up
from mtl_core.encoder import load_tokenizer

WARM_UP_SECONDS = 2
CORES = str(servers.CORES)
SHAPES = [("1", "40", CORES), ("1", "40", "1"), ("1", "1", CORES), ("1", CORES, "1")]
SHAPES += [(CORES, "1", "1")]
"""Processes, requests in a model at a time, torch's threads for one."""
DTYPES = ("float32", "bfloat16")
Setting = tuple[tuple[str, str, str], str]


def measure(setting: Setting, artifact: Path, bodies: Path, seconds: int) -> tuple[float, float]:
    """Requests a second with many connections, milliseconds with one."""
    (processes, passes, threads), dtype = setting
    settings = {"WEB_CONCURRENCY": processes, "PASSES": passes, "THREADS": threads, "DTYPE": dtype}

    def load(connections: int) -> Sample:
        return drive(server.port, route, bodies, connections, seconds)

    route, many = LOADS["predict"].route, LOADS["predict"].connections
    with servers.running("fastapi", artifact, bodies.parent, settings) as server:
        warm_up(server.port, route, bodies, many, WARM_UP_SECONDS)
        time.sleep(1)
        rate = load(many).rate
        time.sleep(1)
        return rate, load(1).p50_ms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="every other one in reverse")
    parser.add_argument("--seconds", type=int, default=6, help="of one measurement")
    parser.add_argument("--artifact", type=Path, help="default: the demo's, trained once")
    options = parser.parse_args()
    try:
        require_wrk()
    except LoadError as error:
        parser.error(str(error))
    artifact = (options.artifact or artifacts.demo_artifact()).resolve()
    found: dict[Setting, list[tuple[float, float]]] = defaultdict(list)
    settings = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    with tempfile.TemporaryDirectory(prefix="peer-settings-") as folder:
        texts = corpus.sentences(load_tokenizer(str(artifact / "encoder")), corpus.NUM_BODIES)
        bodies = corpus.write_bodies(Path(folder), texts)[LOADS["predict"].bodies]
        for number in range(options.rounds):
            for setting in settings[:: -1 if number % 2 else 1]:
                try:
                    found[setting].append(measure(setting, artifact, bodies, options.seconds))
                except (LoadError, servers.ServerError) as error:
                    print(f"{setting}: {error}", file=sys.stderr)
    print("| processes | requests in a model at a time | torch threads | fp32 | bf16 |")
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        print(f"| {' | '.join([*shape, *(cell(found[shape, dtype]) for dtype in DTYPES)])} |")


def cell(rounds: list[tuple[float, float]]) -> str:
    if not rounds:
        return "not measured"
    rate, p50 = map(median, zip(*rounds, strict=True))
    return f"{rate:.0f}/s, {p50:.1f} ms"


if __name__ == "__main__":
    main()
