"""With RAY_ADDRESS the command deploys to that cluster and leaves it as it is otherwise."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from serve_app.launch import LOCAL_ENVIRONMENT, SERVE_ENVIRONMENT
from serve_app.ports import loopback_haproxy
from tests.serve_app.test_faults import TEXTS, add_feelings, changed, install, wait_for
from tests.servers import call, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture
def cluster() -> Iterator[tuple[str, psutil.Process]]:
    """A Ray that somebody else has started: its address and the process above all of its own."""
    port = free_port()
    start = ["start", "--head", "--block", f"--port={port}", "--num-cpus=3"]
    quiet = ["--include-dashboard=false", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    environment = {
        **os.environ,
        **SERVE_ENVIRONMENT,
        **LOCAL_ENVIRONMENT,
        "RAY_SERVE_HAPROXY_BINARY_PATH": loopback_haproxy(),
    }
    ray = Path(sys.executable).with_name("ray")
    process = subprocess.Popen([ray, *start, *quiet], env=environment, stdout=subprocess.DEVNULL)
    top = psutil.Process(process.pid)
    wait_for(lambda: listens(port))
    yield f"127.0.0.1:{port}", top
    family = [*top.children(recursive=True), top]
    for member in family:
        with suppress(psutil.Error):
            member.kill()
    process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def encoder_pids(cluster: psutil.Process) -> set[int]:
    found = set()
    for process in cluster.children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::ServeReplica:encoder:"):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def test_running_it_again_adds_a_head_and_the_encoder_goes_on(
    cluster: tuple[str, psutil.Process], artifact: Path, tmp_path: Path
) -> None:
    address, top = cluster
    served = Path(shutil.copytree(artifact, tmp_path / "served"))
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def deploy() -> str:
        settings = ["--set", "runtime=torch-fp32", "--set", "poll_seconds=0.5"]
        command = [sys.executable, "-m", "serve_app", "--artifact", str(served), *settings]
        done = subprocess.run(
            [*command, "--port", str(port)],
            env={**os.environ, "RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "`serve shutdown` stops it" in deploy()
    wait_for(lambda: call(f"{url}/ready").status == 200)
    before = encoder_pids(top)
    assert len(before) == 1
    install(changed(artifact, tmp_path / "new", add_feelings), served)
    deploy()
    wait_for(lambda: "feelings" in call(f"{url}/info").body["tasks"])
    (row,) = call(f"{url}/v1/predict", {"inputs": TEXTS[0]}).body["results"]
    assert row["feelings"] == row["mood"]
    assert encoder_pids(top) == before
