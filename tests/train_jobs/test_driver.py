"""The driver's part of a run: Ctrl-C, and why training failed."""

from __future__ import annotations

import signal
from pathlib import Path

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


def test_what_leads_the_workers_may_die_too(tmp_path: Path) -> None:
    folder = RunFolder(experiment("none", output_dir=str(tmp_path)))
    message = explain(RayActorError(error_msg="the actor died:\nkilled for want of memory"), folder)
    assert "killed for want of memory" in message
    assert "retries" not in message
