"""Two drivers never work in one run's folder; a dead one does not keep a living one out."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mtl_core.config import parse_experiment
from mtl_core.errors import ConfigError
from train_jobs import locks
from train_jobs.locks import check_file, hold_file, hold_object
from train_jobs.runs import RunFolder

HOLDER = """
import sys, time
from pathlib import Path
from train_jobs.locks import hold_file
with hold_file(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def folder(tmp_path: Path, experiment: dict[str, Any]) -> RunFolder:
    return RunFolder(parse_experiment({**experiment, "output_dir": str(tmp_path)}))


@pytest.mark.slow
def test_a_folder_in_use_is_refused_with_who_uses_it_and_is_free_when_that_process_is_killed(
    folder: RunFolder, tmp_path: Path, experiment: dict[str, Any]
) -> None:
    config = parse_experiment({**experiment, "output_dir": str(tmp_path)})
    with folder.claim(config):
        pass
    lock = tmp_path / "small/run.lock"
    with another_process(lock) as other:
        for attempt in (lambda: folder.resumes(config), lambda: folder.claim(config).__enter__()):
            with pytest.raises(ConfigError, match="is in use by") as refused:
                attempt()
            assert f"process {other.pid} on host {socket.gethostname()}" in str(refused.value)
            assert "--set name=" in str(refused.value)
        other.send_signal(signal.SIGKILL)
        other.wait()
        with folder.claim(config):
            assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_lock_is_held_within_the_block_only(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    check_file(lock)
    with hold_file(lock):
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            check_file(lock)
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), hold_file(lock):
            pass
    check_file(lock)
    with hold_file(lock):
        pass


def test_a_run_of_another_configuration_that_came_in_between_is_not_overwritten(
    folder: RunFolder, tmp_path: Path, experiment: dict[str, Any]
) -> None:
    ours = parse_experiment({**experiment, "output_dir": str(tmp_path)})
    theirs = parse_experiment({**experiment, "output_dir": str(tmp_path), "seed": 1})
    assert not folder.resumes(ours)
    with folder.claim(theirs):
        (tmp_path / "small/checkpoint_2026-01-01").mkdir()
    with pytest.raises(ConfigError, match="seed was 1, now 42"), folder.claim(ours):
        pass


@pytest.fixture
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """An object store: names to bytes, no locks. A lock that is lost ends no test process."""
    monkeypatch.setattr(locks, "interrupt", lambda: None)
    filesystem = fsspec.filesystem("memory")
    return filesystem, f"/{request.node.name}/run.lock"


def leave(filesystem: Any, path: str, host: str, pid: int, pids: str) -> None:
    owner = {"pid": pid, "host": host, "pids": pids, "time": 1}
    filesystem.pipe_file(path, json.dumps(owner).encode())


def ended_process() -> int:
    """A number that no process of this machine has any more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_on_an_object_store_a_living_driver_keeps_others_out(store: tuple[Any, str]) -> None:
    filesystem, path = store
    with hold_object(filesystem, path, renew=0.1):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on host"):
            hold_object(filesystem, path, renew=0.3).__enter__()
        assert filesystem.exists(path)
    assert not filesystem.exists(path)


@pytest.mark.parametrize(
    ("host", "pids"),
    [
        ("elsewhere", "of another machine"),
        (socket.gethostname(), "of another container"),
        (socket.gethostname(), ""),
    ],
)
def test_on_an_object_store_a_dead_driver_of_another_machine_is_found_out_by_its_silence(
    host: str, pids: str, store: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, path = store
    leave(filesystem, path, host, ended_process(), pids)
    if not pids:
        monkeypatch.setattr(locks, "_pids", str)  # no Linux
    started = time.monotonic()
    with hold_object(filesystem, path, renew=0.2):
        assert time.monotonic() - started > 0.6
        assert json.loads(filesystem.cat_file(path))["pid"] == os.getpid()


def test_on_an_object_store_a_dead_driver_of_this_machine_costs_no_waiting(
    store: tuple[Any, str],
) -> None:
    filesystem, path = store
    leave(filesystem, path, socket.gethostname(), ended_process(), locks._pids())
    started = time.monotonic()
    with hold_object(filesystem, path, renew=5):
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBUSY])
def test_a_store_that_says_otherwise_that_the_lock_is_there_is_understood(
    number: int, store: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, path = store
    write = filesystem.pipe_file

    def refuse(path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise OSError(number, "at least one of the preconditions did not hold")
        write(path, value)

    monkeypatch.setattr(filesystem, "pipe_file", refuse)
    with pytest.raises(OSError, match="preconditions"):
        hold_object(
            filesystem, path
        ).__enter__()  # nothing is there: the store means something else
    leave(filesystem, path, socket.gethostname(), ended_process(), locks._pids())
    with hold_object(filesystem, path, renew=0.1):
        assert json.loads(filesystem.cat_file(path))["pid"] == os.getpid()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on host"):
            hold_object(filesystem, path, renew=0.3).__enter__()


TAKEN_OVER = """
import json, sys, time
import fsspec
from mtl_core.command import run_command
from train_jobs.locks import hold_object

def main():
    store, path = fsspec.filesystem("memory"), "/run.lock"
    try:
        with hold_object(store, path, renew=0.1):
            if sys.argv[1] == "held":
                store.pipe_file(path, json.dumps({"pid": 7, "host": "elsewhere"}).encode())
            else:
                store.rm_file(path)
            time.sleep(60)
            print("it went on")
    finally:
        print(store.cat_file(path).decode() if store.exists(path) else "no lock")

run_command(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("now", "by", "left"),
    [
        ("held", "process 7 on host elsewhere", '{"pid": 7, "host": "elsewhere"}'),
        ("ended", "another process", "no lock"),
    ],
)
def test_on_an_object_store_a_driver_that_was_taken_over_ends_and_leaves_the_lock_alone(
    now: str, by: str, left: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TAKEN_OVER, now], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1, done.stderr
    assert f"was taken over by {by}" in done.stderr
    assert done.stdout.splitlines() == [left]


def test_on_an_object_store_a_driver_that_ends_leaves_another_s_lock(
    store: tuple[Any, str],
) -> None:
    filesystem, path = store
    with hold_object(filesystem, path):
        leave(filesystem, path, "elsewhere", 7, "of another machine")
    assert json.loads(filesystem.cat_file(path))["pid"] == 7
