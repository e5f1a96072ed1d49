"""serve_app beside the servers and libraries people would otherwise use, in one run.

    python -m benchmarks.serve [--only predict latency] [--rounds 5] [--seconds 6]

Every round starts each server in turn, alone on the machine, warms it up, loads it with wrk and
stops it; every other round goes the other way. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environments import environment, folder_of, packages
from benchmarks.serve import artifacts, corpus, servers
from benchmarks.serve.checks import agreement, complete, disagreements, utilisation
from benchmarks.serve.plan import LOADS, OFFLINE, ROWS, Load, Row, schedule
from benchmarks.serve.report import Values, compare, table
from benchmarks.serve.wrk import LoadError, drive, require_wrk, warm_up

OFFLINE_SCRIPT = Path(__file__).with_name("offline.py")
BACKENDS = Path(__file__).with_name("sentence_transformers.txt")
OFFLINE_TITLES = {
    "torch": "(d) sentence-transformers, torch fp32",
    "openvino": "(d) its OpenVINO backend",
    "onnx": "(d) its ONNX backend",
}
WARM_UP_SECONDS = 2
DRAIN_SECONDS = 1
"""Pause before what counts: wrk leaves its last requests with the server."""
NUM_COMPARED = 32
"""Sentences whose answers are compared: a peer that answers otherwise does other work."""


class Benchmark:
    """What all rounds share, and what they measured."""

    def __init__(self, artifact: Path, folder: Path, seconds: int, count: int) -> None:
        from transformers import AutoTokenizer

        self.artifact, self.folder, self.seconds = artifact, folder, seconds
        tokenizer = AutoTokenizer.from_pretrained(artifact / "encoder")
        self.texts = corpus.sentences(tokenizer, corpus.NUM_BODIES)
        self.bodies = corpus.write_bodies(folder, self.texts)
        self.offline_texts = corpus.mixed_lengths(self.texts, count)
        (folder / "texts.json").write_text(json.dumps(self.offline_texts), encoding="utf-8")
        self.lengths = {
            "offline": [len(ids) for ids in tokenizer(self.offline_texts)["input_ids"]],
            "sentence": [len(ids) for ids in tokenizer(self.texts)["input_ids"]],
        }
        self.values: dict[tuple[str, str], list[dict[str, float]]] = {}
        self.starts: dict[str, list[float]] = {}
        self.runtimes: dict[str, str] = {}
        self.answers: dict[str, Any] = {}
        self.failures: dict[str, str] = {}
        self.rounds = 0

    def serve(self, name: str, loads: Sequence[str]) -> None:
        """Start a server, put each load on it, stop it."""
        with servers.running(name, self.artifact, self.folder) as server:
            self.starts.setdefault(name, []).append(server.start_seconds)
            log(f"{name}: ready after {server.start_seconds:.1f} s")
            if name.startswith("ours"):
                self.runtimes[name] = server.get("/info")["runtime"]
            for key in loads:
                load = LOADS[key]
                bodies = self.bodies[load.bodies]
                self._ask(server, name, load)
                warm_up(server.port, load.route, bodies, load.connections, WARM_UP_SECONDS)
                time.sleep(DRAIN_SECONDS)
                sample = drive(server.port, load.route, bodies, load.connections, self.seconds)
                self._ask(server, name, load)  # wrk looks at statuses only
                self._add(name, key, {**asdict(sample), "rate": sample.rate})

    def _ask(self, server: servers.Running, name: str, load: Load) -> None:
        """Check that a server answers, and keep its first answers of each kind."""
        texts = self.texts[:NUM_COMPARED]
        embed = load.bodies == "embed"
        body = {"input": texts, "model": corpus.MODEL} if embed else {"inputs": texts}
        reply = server.post(load.route, json.dumps(body).encode())
        try:
            answers = complete(reply, len(texts))
        except ValueError as error:
            raise servers.ServerError(f"POST {load.route} gave {error}") from error
        self.answers.setdefault(f"embeddings {name}" if embed else name, answers)

    def offline(self, engine: str) -> None:
        """Run offline.py, in the environment that has the engine."""
        python = sys.executable
        if engine in ("openvino", "onnx"):
            python = str(environment(BACKENDS) / "bin/python")
        model = self.artifact if engine == "ours" else self.artifact / "encoder"
        texts = self.folder / "texts.json"
        command = [python, "-P", str(OFFLINE_SCRIPT), engine, str(model), str(texts)]
        variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if engine == "ours":
            variables["PYTHONPATH"] = os.getcwd()
        run = subprocess.run(command, env=variables, capture_output=True, text=True)
        if run.returncode:
            raise LoadError(f"offline {engine} ended with {run.returncode}:\n{run.stderr[-2000:]}")
        result = json.loads(run.stdout)
        self.answers.setdefault(f"{OFFLINE} {engine}", result.pop("vectors", None))
        self._add(engine, OFFLINE, result)

    def counted(self) -> Values:
        """What was measured of servers and engines that never failed."""
        return {key: found for key, found in self.values.items() if key[0] not in self.failures}

    def _add(self, name: str, load: str, values: dict[str, float]) -> None:
        self.values.setdefault((name, load), []).append(values)
        log(f"{name} {load}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def run_rounds(
    bench: Benchmark, keys: Sequence[str], rounds: int, after_each: Callable[[], object]
) -> None:
    """Alternate: what went first in one round goes last in the next."""
    rows = [ROWS[key] for key in keys]
    online, offline = schedule(rows, offline=False), schedule(rows, offline=True)
    steps = [("serve", name) for name in online] + [("offline", name) for name in offline]
    for number in range(rounds):
        log(f"round {number + 1} of {rounds}")
        bench.rounds = number + 1
        for kind, name in [("offline", "gemm"), *steps[:: -1 if number % 2 else 1]]:
            if name in bench.failures:
                continue
            try:
                bench.serve(name, online[name]) if kind == "serve" else bench.offline(name)
            except (LoadError, servers.ServerError, subprocess.CalledProcessError) as error:
                # Half a series would pair rounds that do not belong together.
                bench.failures[name] = str(error)
                log(f"{name} is left out: {error}")
        after_each()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=6, help="of one measurement")
    parser.add_argument("--texts", type=int, default=10_000, help="encoded offline")
    parser.add_argument("--artifact", type=Path, help="default: the demo's, trained once")
    parser.add_argument("--int8", action="store_true", help="ours with the checked int8 encoder")
    parser.add_argument("--output", type=Path, default=Path("build/bench-serve.json"))
    options = parser.parse_args()
    rows = {key: ROWS[key] for key in options.only}
    try:
        if any(row.load != OFFLINE for row in rows.values()):
            require_wrk()
    except LoadError as error:
        parser.error(str(error))
    if options.artifact and (tasks := artifacts.multilabel_tasks(options.artifact)):
        parser.error(f"--artifact: peers do not serve multilabel tasks, as {tasks[0]} is")
    artifact = (options.artifact or artifacts.demo_artifact()).resolve()
    if options.int8:
        artifact = artifacts.int8_artifact(artifact)
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        bench = Benchmark(artifact, Path(folder), options.seconds, options.texts)
        # After each round, whatever becomes of the next.
        save = partial(save_measured, options.output, bench, rows)
        run_rounds(bench, options.only, options.rounds, save)
    content = save()
    content["versions"] = versions(rows.values())
    content["agreement"] = agreement(bench.answers)
    content["utilisation"] = utilisation(artifact, bench.lengths, bench.counted())
    write(options.output, content)
    results = content["results"]
    titles = {name: server.title for name, server in servers.SERVERS.items()} | OFFLINE_TITLES
    print("\n".join(table(rows, results, titles)))
    for name in ("utilisation", "agreement", "failures"):
        print(f"\n{name}: {json.dumps(content[name], indent=2)}")
    missing = [key for key, row in rows.items() if row.asked is not None and results[key] is None]
    wrong = [f"not measured: {', '.join(missing)}"] if missing else []
    wrong += disagreements(content["agreement"])
    if wrong:
        sys.exit("\n".join(wrong))


def save_measured(path: Path, bench: Benchmark, rows: Mapping[str, Row]) -> dict[str, Any]:
    """Write what the rounds so far gave."""
    counted = bench.counted()
    content = {
        "machine": {"cpu": cpu_name(), "cores": servers.CORES, "load": os.getloadavg()},
        "rounds": bench.rounds,
        "seconds": bench.seconds,
        "results": {key: compare(row, counted) for key, row in rows.items()},
        "samples": {f"{name} {load}": v for (name, load), v in bench.values.items()},
        "start_seconds": bench.starts,
        "runtimes": bench.runtimes,
        "failures": bench.failures,
    }
    write(path, content)
    return content


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def versions(rows: Iterable[Row]) -> dict[str, Any]:
    """The commit measured, and the packages on our side and on those that have their own."""
    names = {row.peer for row in rows}
    wanted = {"openvino": BACKENDS, "onnx": BACKENDS, "infinity": servers.INFINITY}
    revision = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = {
        "commit": subprocess.run(revision, capture_output=True, text=True).stdout.strip() or None,
        "ours": packages(Path(sys.executable)),
    }
    for path in {path for name, path in wanted.items() if name in names}:
        python = folder_of(path) / "bin/python"
        found[path.stem] = packages(python) if python.is_file() else None
    return found


def cpu_name() -> str:
    """As Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


if __name__ == "__main__":
    main()
