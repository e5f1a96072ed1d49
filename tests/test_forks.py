"""Scripts that run in a fork of a process which has the libraries loaded."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from mtl_core import forks
from tests.commands import ROOT, environment

SCRIPT = """
import json, os, sys, threading
ids = []
if "ray" in sys.modules:
    from ray import ObjectRef
    def draw():
        ids.append(ObjectRef.from_random().hex())
    draw()
    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
print(json.dumps({
    "ids": ids,
    "arguments": sys.argv,
    "environment": dict(os.environ),
    "folder": os.getcwd(),
    "libraries": [name for name in ("torch", "ray", "transformers") if name in sys.modules],
    "parent": os.getppid(),
    "main": __name__,
}))
print("a complaint", file=sys.stderr)
"""
DRIVER = """
import sys
from mtl_core.forks import forked_workers
with forked_workers(sys.argv[1]) as command:
    print(command, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def run_by(command: list[str], script: Path) -> tuple[dict[str, Any], str]:
    """What the script tells of its process, and its standard error."""
    done = subprocess.run(
        [*command, str(script), "--number", "5"],
        cwd=script.parent,
        env={"ONLY": "größer", "LC_ALL": "C"},
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("preload", ["train_jobs.preload", "serve_app.preload"])
def test_a_fork_has_the_streams_folder_environment_and_arguments_of_the_one_that_asked(
    preload: str, script: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, preload],
        cwd=ROOT,
        env=environment(None),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        command = shlex.split(driver.stdout.readline())
        (server,) = psutil.Process(driver.pid).children()
        told, complaint = run_by(command, script)
        again, _ = run_by(command, script)
        driver.send_signal(signal.SIGKILL)
    assert told["arguments"] == [str(script), "--number", "5"]
    assert told["environment"] == {"ONLY": "größer", "LC_ALL": "C"}
    assert told["folder"] == str(script.parent)
    assert told["main"] == "__main__"
    assert told["libraries"] == ["torch", "ray", "transformers"]
    assert told["parent"] == again["parent"] == server.pid
    ids = {*told["ids"], *again["ids"]}
    assert len(ids) == 4, "workers would give different objects the same id"
    assert complaint == "a complaint\n"
    psutil.wait_procs([server], timeout=20)
    assert not server.is_running(), "it outlived its driver"


def test_without_the_process_that_forks_python_starts_as_ever(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", forks.__file__, str(tmp_path / "nobody")]
    told, _ = run_by(command, script)
    assert told["arguments"] == [str(script), "--number", "5"]
    assert told["libraries"] == []


@pytest.mark.parametrize(("address", "gpu"), [("10.0.0.1:6379", False), ("", True)])
def test_on_a_cluster_of_others_and_beside_a_gpu_nothing_is_forked(
    monkeypatch: pytest.MonkeyPatch, address: str, gpu: bool
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr(os.path, "exists", lambda path: gpu and path == "/dev/nvidiactl")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with forks.forked_workers("train_jobs.preload") as command:
        assert command is None
