"""The driver's part of a run: Ctrl-C, and why training failed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import WorkerGroupError

from tests.small_runs import experiment
from train_jobs.driver import explain, stop_as_interrupt
from train_jobs.runs import RunFolder


def test_once_training_has_ended_ctrl_c_is_no_longer_ray_train_s() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_as_interrupt():
        signal.signal(signal.SIGINT, lambda *_: None)  # as `fit` does, and leaves it so
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_disk_is_the_one_that_the_worker_names(tmp_path: Path) -> None:
    folder = RunFolder(experiment("none", output_dir=str(tmp_path)))
    cause = RuntimeError(
        "Traceback …\nOSError: [Errno 28] No space left on device: '/tmp/abc/model.safetensors'\n"
        "During handling …\nRuntimeError: cannot report"
    )
    message = explain(WorkerGroupError("failed", {1: cause}), folder)
    assert message.startswith("the disk is full: worker 1: OSError: ")
    assert "'/tmp/abc/model.safetensors'" in message
    assert f"run the same command to resume {tmp_path}/small" in message


@pytest.mark.parametrize(
    ("causes", "told"),
    [
        (["gloo: Connection closed by peer [::1]", "killed: low on memory"], "worker 1: killed"),
        (["gloo: Connection reset by peer", "gloo: Connection closed by peer"], "worker 0: gloo"),
        (["no CUDA device", "also no CUDA device"], "worker 0: no CUDA device"),
        (["no CUDA device", "[Errno 28] No space left"], "the disk is full: worker 1: [Errno 28]"),
    ],
)
def test_the_worker_that_failed_by_itself_is_asked_not_one_that_lost_it(
    causes: list[str], told: str, tmp_path: Path
) -> None:
    folder = RunFolder(experiment("none", output_dir=str(tmp_path)))
    failures: dict[int, Exception] = dict(enumerate(map(RuntimeError, causes)))
    assert told in explain(WorkerGroupError("failed", failures), folder)


def test_what_leads_the_workers_may_die_too(tmp_path: Path) -> None:
    folder = RunFolder(experiment("none", output_dir=str(tmp_path)))
    message = explain(RayActorError(error_msg="the actor died:\nkilled for want of memory"), folder)
    assert "killed for want of memory" in message
    assert "retries" not in message
