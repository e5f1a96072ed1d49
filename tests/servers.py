"""Servers for tests: the routes in this process, and the real command with Ray and HAProxy."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from serve_app.app import build_app
from serve_app.auth import Keys
from serve_app.gate import Gate
from serve_app.haproxy import free_ports
from serve_app.heads import HeadCall, LocalHead
from serve_app.loaded import load_artifact
from serve_app.metrics import Metrics
from serve_app.requestlog import RequestLog
from serve_app.routes import Routes
from serve_app.service import Service
from serve_app.settings import Settings
from tests import preloaded


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What the condition gives once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)
    return found


@dataclass(frozen=True)
class Answer:
    """Status, headers (lower case) and JSON of a reply."""

    status: int
    headers: Mapping[str, str]
    body: Any


def call(
    url: str,
    body: Any = None,
    key: str | None = None,
    timeout: float = 60.0,
    method: str | None = None,
    content_type: str | None = "application/json",
    **more: str,
) -> Answer:
    """One request; errors of the server are answers too.

    Args:
        url: where to.
        body: bytes as they are, anything else as JSON.
        key: API key.
        timeout: seconds.
        method: POST with a body and GET without when None.
        content_type: None sends urllib's own.
        more: further headers, with _ for -.
    """
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in more.items()}
    if content_type is not None:
        headers["content-type"] = content_type
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return _answer(reply.status, reply.headers, reply.read())
    except urllib.error.HTTPError as error:
        return _answer(error.code, error.headers, error.read())


def _answer(status: int, headers: Any, content: bytes) -> Answer:
    found = {name.lower(): value for name, value in headers.items()}
    is_json = found.get("content-type", "").startswith("application/json")
    return Answer(status, found, json.loads(content) if is_json else content.decode())


def metric(url: str, name: str) -> float:
    """A sample of /metrics, named without its replica; 0 if nothing was counted yet."""
    text = re.sub(
        r'(?<=\{)replica="[^"]*",?|,replica="[^"]*"', "", str(call(f"{url}/metrics").body)
    )
    lines = text.replace("{} ", " ").splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))


async def _always_ready() -> None:
    return


@contextmanager
def local_server(
    artifact: Path,
    head_call: Any = None,
    log: RequestLog | None = None,
    prefix: str = "",
    ready: Callable[[], Awaitable[None]] = _always_ready,
    **settings: Any,
) -> Iterator[tuple[str, Service]]:
    """The routes on a loopback port of this process, heads included; URL and service.

    Args:
        artifact: what to serve.
        head_call: makes the line to a task's head; in this process when None.
        log: where requests are logged; nowhere when None.
        prefix: path that all routes are under, as behind a proxy.
        ready: raises ApiError while heads are away.
        settings: of the server.
    """
    chosen = Settings(artifact=str(artifact), **settings)
    keys = Keys(chosen.keys_file, chosen.poll_seconds)
    model = load_artifact(
        chosen.artifact, chosen.runtime, chosen.threads, "cpu", chosen.batch_tokens
    )
    metrics = Metrics("local")

    def local(_: str) -> HeadCall:
        return LocalHead()

    log = log or RequestLog(False)
    service = Service(model, head_call or local, metrics, chosen, log)
    gate = Gate(service, chosen, keys, log)
    port = free_ports(1)[0]
    app = build_app(Routes(gate, ready))
    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[Mount(prefix, app)]) if prefix else app,
            host="127.0.0.1",
            port=port,
            log_level="critical",
        )
    )
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}{prefix}", service
    finally:
        server.should_exit = True
        thread.join(10)


@dataclass
class RealServer:
    """`python -m serve_app` with Ray, HAProxy and replicas."""

    url: str
    process: preloaded.Process
    log: Path

    def stop(self, number: int = signal.SIGINT) -> int:
        """Stop it as Ctrl-C does; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(90)


def processes(server: RealServer, title: str) -> list[psutil.Process]:
    """The server's processes whose name or title begins so."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            if line.startswith(title) or process.name() == title:
                found.append(process)
        except psutil.Error:
            continue
    return found


def listening(server: RealServer) -> list[Any]:
    """Addresses, each with `ip` and `port`, that the server's processes listen on."""
    family = [psutil.Process(server.process.pid)]
    family += family[0].children(recursive=True)
    found = []
    for process in family:
        with suppress(psutil.Error):  # some come and go
            connections = process.net_connections("tcp")
            found += [each.laddr for each in connections if each.status == psutil.CONN_LISTEN]
    return [type(at)(at.ip.removeprefix("::ffff:"), at.port) for at in found]


def heads(server: RealServer, task: str) -> list[psutil.Process]:
    return processes(server, f"ray::ServeReplica:head-{task}:")


@contextmanager
def real_server(
    artifact: Path,
    folder: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[RealServer]:
    """The command as users run it, until it says that it is ready; stopped afterwards."""
    port = free_ports(1)[0]
    log = folder / f"server-{port}.log"
    options = ("--artifact", str(artifact), "--port", str(port), *arguments)
    whole = {**os.environ, "RAY_AUTH_MODE": "disabled", **(env or {})}
    with log.open("wb") as output:
        process = preloaded.Process("serve_app", options, cwd or Path.cwd(), whole, output, output)
    server = RealServer(f"http://127.0.0.1:{port}", process, log)
    try:
        deadline = time.monotonic() + 120
        while "ready: " not in log.read_text(encoding="utf-8"):
            said = log.read_text(encoding="utf-8")
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        yield server
    finally:
        server.stop()
