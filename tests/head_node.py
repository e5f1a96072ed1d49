"""A head node of the test's own, on loopback, as a user starts it with `ray start`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from serve_app.haproxy import free_ports, own_haproxy_ports
from tests import preloaded
from tests.commands import ROOT
from tests.servers import wait_for


@dataclass
class HeadNode:
    """A head node, and what reaches it."""

    process: subprocess.Popen[str]
    env: dict[str, str]
    gcs: str
    dashboard: str

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, command)),
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def serve_app(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return preloaded.run("serve_app", tuple(map(str, arguments)), ROOT, self.env, 120)

    def serve_deploy(self, file: Path) -> None:
        """As a user at the head node types it."""
        serve = Path(sys.executable).with_name("serve")
        done = self.run(serve, "deploy", "--address", self.dashboard, file)
        assert done.returncode == 0, done.stdout + done.stderr


RAY_START = (sys.executable, "-m", "tests.ray_start", "start", "--head")


@contextmanager
def head_node(
    environment: Mapping[str, str], command: Sequence[str] = RAY_START
) -> Iterator[HeadNode]:
    """Run a command that is `ray start`, held to loopback and ports of its own, while in use.

    Args:
        environment: for Ray and for what reaches it, on top of this process's.
        command: in place of plain `ray start --head`.
    """
    ports = free_ports(8)
    env = {**os.environ, "PYTHONPATH": str(ROOT), **own_haproxy_ports(), **environment}
    env[preloaded.FOLDER] = preloaded.scripts()
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all on the loopback address
    env.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets: short paths
        log = Path(folder, "ray.log")
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [*command, *_own_places(ports, folder)],
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        gcs = f"127.0.0.1:{ports[0]}"
        env["RAY_ADDRESS"] = gcs
        try:
            while "Ray runtime started" not in (said := log.read_text(encoding="utf-8")):
                assert process.poll() is None, said
                time.sleep(0.2)
            wait_for(lambda: listens(ports[1]))
            yield HeadNode(process, env, gcs, f"http://127.0.0.1:{ports[1]}")
        finally:
            if process.poll() is None:
                _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    """Have it end as Ctrl-C does, and kill what it leaves."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    _, left = psutil.wait_procs(children, timeout=5)
    for survivor in left:
        survivor.kill()


def _own_places(ports: Sequence[int], folder: str) -> list[str]:
    """Options of `ray start` for a head node that ends with its process."""
    names = "port dashboard-port dashboard-agent-listen-port dashboard-agent-grpc-port"
    names += " ray-client-server-port metrics-export-port node-manager-port object-manager-port"
    chosen = [f"--{name}={port}" for name, port in zip(names.split(), ports, strict=True)]
    chosen += ["--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    return [*chosen, "--num-cpus=4", f"--temp-dir={folder}", "--disable-usage-stats"]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
