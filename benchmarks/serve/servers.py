"""The servers that are compared, and starting and stopping one so that nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from benchmarks.environments import environment
from benchmarks.serve import corpus
from serve_app.haproxy import free_ports

INFINITY = Path(__file__).with_name("infinity.txt")
START_SECONDS = 240
STOP_SECONDS = 30
CORES = os.cpu_count() or 1


class ServerError(RuntimeError):
    """A server that did not start, with what it printed last, or gave no answer."""


@dataclass(frozen=True)
class Server:
    title: str
    command: Callable[[Path, int], list[str]]
    """(artifact, port) → arguments."""
    ready: str = "/health"
    settings: Mapping[str, str] = field(default_factory=dict)
    """Environment variables."""


def _ours(artifact: Path, port: int) -> list[str]:
    """On CPUs: peers have nothing else."""
    command = [sys.executable, "-m", "serve_app", "--artifact", str(artifact)]
    return [*command, "--port", str(port), "--gpus", "0"]


def _fp32(artifact: Path, port: int) -> list[str]:
    return [*_ours(artifact, port), "--set", "runtime=torch-fp32"]


def _in_process(artifact: Path, port: int) -> list[str]:
    return [*_ours(artifact, port), "--set", "heads=in_process"]


def _fastapi(_: Path, port: int) -> list[str]:
    command = [sys.executable, "-m", "uvicorn", "benchmarks.serve.peer_fastapi:app"]
    return [*command, "--port", str(port), "--no-access-log", "--log-level", "warning"]


def _ray_serve(_: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.serve.peer_ray_serve", "--port", str(port)]


def _infinity(artifact: Path, port: int) -> list[str]:
    command = [
        str(environment(INFINITY) / "bin/infinity_emb"),
        "v2",
        "--engine",
        "torch",
    ]
    command += ["--model-id", str(artifact / "encoder"), "--served-model-name", corpus.MODEL]
    command += ["--device", "cpu", "--no-bettertransformer"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1"]
    return [*command, "--log-level", "warning"]


THROUGHPUT = {"PASSES": str(CORES), "THREADS": "1"}
"""Of (a)'s settings in one process the one with most requests a second, by peer_settings.py."""
PROCESSES = {"WEB_CONCURRENCY": str(CORES), "PASSES": "1", "THREADS": "1"}

SERVERS = {
    "ours": Server("serve_app", _ours, ready="/ready"),
    "ours_fp32": Server("serve_app, torch fp32", _fp32, ready="/ready"),
    "ours_in_process": Server("serve_app, heads in the encoder", _in_process, ready="/ready"),
    "fastapi": Server("(a) FastAPI, torch fp32", _fastapi, settings=THROUGHPUT),
    "fastapi_latency": Server("(a) set for latency", _fastapi, settings={"PASSES": "1"}),
    "fastapi_latency_bf16": Server(
        "(a) set for latency, in bf16", _fastapi, settings={"PASSES": "1", "DTYPE": "bfloat16"}
    ),
    "fastapi_bf16": Server("(a) in bf16", _fastapi, settings={**THROUGHPUT, "DTYPE": "bfloat16"}),
    "fastapi_processes": Server("(a) a process a core", _fastapi, settings=PROCESSES),
    "ray_serve": Server("(b) Ray Serve, textbook", _ray_serve),
    "infinity": Server(
        "(c) Infinity 0.0.78", _infinity, settings={"INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    ),
}


@dataclass(frozen=True)
class Running:
    port: int
    start_seconds: float

    def get(self, route: str) -> Any:
        """As `post`."""
        return self._ask("GET", route)

    def post(self, route: str, body: bytes) -> Any:
        """One request.

        Raises:
            ServerError: no answer came, it is no JSON, or its status is not 200; a redirect is
                none either.
        """
        return self._ask("POST", route, body)

    def _ask(self, method: str, route: str, body: bytes | None = None) -> Any:
        try:
            status, answer = _request(self.port, method, route, body)
        except (OSError, HTTPException) as error:
            raise ServerError(f"{method} {route} gave no answer: {error!r}") from error
        if status != 200:
            raise ServerError(f"{method} {route} gave {status}: {answer[:300]!r}")
        try:
            return json.loads(answer)
        except ValueError as error:
            raise ServerError(f"{method} {route} gave no JSON: {answer[:300]!r}") from error


@contextmanager
def running(
    name: str, artifact: Path, logs: Path, settings: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A server of SERVERS, alone, ready; every process of its session is gone afterwards.

    Settings replace the server's own.

    Raises:
        ServerError: it ended or was not ready in time.
    """
    server, port = SERVERS[name], free_ports(1)[0]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    settings = server.settings if settings is None else settings
    variables |= settings
    variables["ARTIFACT"] = str(artifact)
    log = logs / f"{name}.log"
    command = server.command(artifact, port)  # it may install the server first
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        processes = int(settings.get("WEB_CONCURRENCY", "1"))
        _wait_until_ready(process, port, server.ready, log, processes)
        yield Running(port, time.monotonic() - started)
    finally:
        _stop(process)


def _wait_until_ready(
    process: subprocess.Popen[bytes], port: int, route: str, log: Path, processes: int
) -> None:
    """Of several processes each gives an answer of its own, and all of them must have come."""
    deadline = time.monotonic() + START_SECONDS
    answers: set[bytes] = set()
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError, HTTPException):
            status, answer = _request(port, "GET", route)
            if status == 200:
                answers.add(answer)
        if len(answers) >= processes:
            return
        time.sleep(0.2)
    ended = process.poll()
    reason = "was not ready in time" if ended is None else f"ended with {ended}"
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise ServerError(f"{log.stem} {reason}; {log} ends with:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask, wait, then kill what is left of the session: Ray's daemons have groups of their own."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while (left := _session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _session(leader: int) -> list[int]:
    """Processes of the session that a process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it ended meanwhile
        if int(session) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _request(port: int, method: str, route: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, route, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
