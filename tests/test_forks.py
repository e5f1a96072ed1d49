"""What Ray starts runs in a fork of a process which has the libraries loaded."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
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
    "pid": os.getpid(),
    "parent": os.getppid(),
    "main": __name__,
}))
print("a complaint", file=sys.stderr)
if "--stay" in sys.argv:
    import time
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.close(stream.fileno())
    time.sleep(1000)
"""
DRIVER = """
import sys
from mtl_core.forks import forked_workers
with forked_workers(sys.argv[1]) as scripts:
    print(scripts, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def ray_like(tmp_path: Path) -> Path:
    """A package with Ray's two scripts: one tells of its process, one what it was started with."""
    workers = tmp_path / "ray" / "_private" / "workers"
    workers.mkdir(parents=True)
    (tmp_path / "ray" / "__init__.py").touch()
    (workers / "default_worker.py").write_text(SCRIPT, encoding="utf-8")
    (workers / "setup_worker.py").write_text("import sys; print(sys.argv[1:])", encoding="utf-8")
    return workers / "default_worker.py"


def run_as_ray(
    ray_like: Path, *command: str, job: str | None = "01000000"
) -> tuple[str, str, dict[str, str]]:
    """What a script prints and complains of, and the environment that it was started in."""
    variables = {"ONLY": "größer", "LC_ALL": "C", "PYTHONPATH": str(ray_like.parents[3])}
    if job is not None:
        variables["RAY_JOB_ID"] = job
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ray_like.parent,
        env=variables,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=True,
    )
    return done.stdout, done.stderr, variables


def prepared(**context: Any) -> str:
    """The argument in which Ray hands over a runtime environment."""
    usual = {"command_prefix": [], "env_vars": {}, "py_executable": sys.executable}
    more = {"override_worker_entrypoint": None, "java_jars": []}
    return f"--serialized-runtime-env-context={json.dumps({**usual, **more, **context})}"


@contextmanager
def scripts_of(preload: str, number: int) -> Iterator[tuple[str, psutil.Process]]:
    """Their folder, and the process that forks; the one that started it gets a signal then."""
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, preload],
        cwd=ROOT,
        env=environment(None),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        folder = driver.stdout.readline().strip()
        (server,) = psutil.Process(driver.pid).children()
        yield folder, server
        driver.send_signal(number)


@pytest.mark.slow
def test_a_fork_has_the_streams_folder_environment_and_arguments_of_the_one_that_asked(
    ray_like: Path,
) -> None:
    with scripts_of("train_jobs.preload", signal.SIGKILL) as (folder, server):
        worker, setup = f"{folder}/default_worker.py", f"{folder}/setup_worker.py"
        of_no_job, _, _ = run_as_ray(ray_like, worker, job=None)
        said, complaint, variables = run_as_ray(ray_like, worker, "--number", "5")
        plain = prepared(env_vars={"MORE": "ja"})
        with_more, _, _ = run_as_ray(
            ray_like, setup, worker, "--number", "5", plain, "--language=P"
        )
        beyond = prepared(command_prefix=["nice", "&&"])
        left_to_ray, _, _ = run_as_ray(ray_like, setup, worker, beyond)
        of_another, _, _ = run_as_ray(ray_like, worker, job="02000000")
    told, again = json.loads(said), json.loads(with_more)
    assert told["arguments"] == again["arguments"] == [str(ray_like), "--number", "5"]
    assert told["environment"] == variables
    assert again["environment"] == {**variables, "MORE": "ja"}
    assert told["folder"] == str(ray_like.parent)
    assert told["main"] == "__main__"
    assert told["libraries"] == ["torch", "ray", "transformers"]
    assert told["parent"] == again["parent"] == server.pid
    ids = {*told["ids"], *again["ids"]}
    assert len(ids) == 4, "workers would give different objects the same id"
    assert complaint == "a complaint\n"
    assert left_to_ray == f"{[worker, beyond]}\n"
    for other in (of_no_job, of_another):
        assert json.loads(other)["libraries"] == [], "its job would be that of the other forks"
    psutil.wait_procs([server], timeout=20)
    assert not server.is_running(), "it outlived its driver"


@pytest.mark.slow
def test_a_worker_that_does_not_end_with_ray_ends_with_the_command(ray_like: Path) -> None:
    with scripts_of("serve_app.preload", signal.SIGINT) as (folder, server):
        said, _, _ = run_as_ray(ray_like, f"{folder}/default_worker.py", "--stay")
        told = json.loads(said)
        assert told["libraries"] == ["torch", "ray", "transformers"]
        worker = psutil.Process(told["pid"])
        assert worker.ppid() == server.pid
    assert not server.is_running()
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert not Path(folder).exists()


def test_without_the_process_that_forks_a_worker_starts_as_ever(
    ray_like: Path, tmp_path: Path
) -> None:
    worker = tmp_path / "default_worker.py"
    worker.symlink_to(forks.__file__)
    said, _, variables = run_as_ray(ray_like, str(worker), "--number", "5")
    told = json.loads(said)
    assert told["arguments"] == [str(ray_like), "--number", "5"]
    assert told["environment"] == variables
    assert told["libraries"] == []


@pytest.mark.parametrize(
    ("address", "gpu"), [("10.0.0.1:6379", ""), ("", "/dev/nvidiactl"), ("", "/dev/dxg")]
)
def test_on_a_cluster_of_others_and_beside_a_gpu_nothing_is_forked(
    monkeypatch: pytest.MonkeyPatch, address: str, gpu: str
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr(os.path, "exists", lambda path: path == gpu)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with forks.forked_workers("train_jobs.preload") as scripts:
        assert scripts is None


@pytest.mark.parametrize("folder", ["with space", "o'clock", "old (1)", "größer+1.2~@x"])
@pytest.mark.parametrize("forked", [True, False])
def test_where_a_shell_would_misread_python_s_path_ray_is_not_started_without_forks(
    folder: str, forked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    python = f"/{folder}/.venv/bin/python"
    monkeypatch.setattr(sys, "executable", python)
    said = subprocess.run(["bash", "-c", f"printf %s {python}"], capture_output=True, text=True)
    node = forks.own_node(SimpleNamespace(start_api_server=None), "/scripts" if forked else None)
    if forked or said.stdout == python:
        with node:
            pass
    else:
        with pytest.raises(ValueError, match=re.escape(python)), node:
            pass


def test_a_folder_for_ray_s_token_is_the_user_s_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "HOME": str(tmp_path)})
    for _ in range(2):  # a folder that is there stays as it is
        with forks.own_node(SimpleNamespace(start_api_server=None), "/scripts"):
            pass
    assert (tmp_path / ".ray").stat().st_mode & 0o777 == 0o700
