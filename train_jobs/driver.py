"""The driver's part on Ray: find room for the workers, start them, follow them."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError
from ray.train import Checkpoint, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
)
from ray.train.v2.api.exceptions import TrainingFailedError

from mtl_core.config import Experiment
from mtl_core.data.prepare import Data
from mtl_core.errors import TrainingError
from train_jobs.cluster import idle_gpus, is_own, worker_resources
from train_jobs.follower import Follower
from train_jobs.nodes import wait_for_nodes
from train_jobs.progress import progress_log
from train_jobs.runs import RunFolder
from train_jobs.worker import WorkerSession, train_worker

FULL_DISK = ("No space left on device", "Errno 28")
CUT_OFF = ("Connection closed by peer", "Connection reset by peer")
"""What a worker says when another one has ended."""


def train(experiment: Experiment, data: Data, folder: RunFolder) -> Checkpoint:
    """Run an experiment to its end; returns the last checkpoint, which holds weights and scores.

    Raises:
        ConfigError: the workers that are asked for can never be had.
        TrainingError: training cannot go on.
    """
    if hint := idle_gpus(experiment.scale):
        print(hint)
    wait_for_nodes(experiment.scale)
    log = progress_log()
    trainer = build_trainer(experiment, folder, data, log)
    follower = Follower(experiment, folder, log)
    with follower, stop_as_interrupt():
        try:
            result = trainer.fit()
        except (TrainingFailedError, RayActorError) as error:
            raise TrainingError(explain(error, folder)) from error
        except SystemExit as stop:  # what Ray Train turns Ctrl-C into
            raise KeyboardInterrupt from stop
    if follower.failure is not None:
        raise TrainingError(follower.failure)
    checkpoint: Checkpoint | None = result.checkpoint
    assert checkpoint is not None
    return checkpoint


@contextmanager
def stop_as_interrupt() -> Iterator[None]:
    """Let `ray job stop` (SIGTERM) end a run as Ctrl-C does.

    Ray Train gives back what it reserved for its workers at Ctrl-C alone; else the autoscaler keeps
    their nodes until the reservation is three minutes old. Its own answer to Ctrl-C, which it never
    takes back, ends with the block.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LeanTrainer(TorchTrainer):
    """Starts no process for datasets of Ray Data, which it is never given.

    Nor, on a Ray that ends with the command, one that would free the workers' room after it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        needless: tuple[type, ...] = (DatasetsCallback,)
        if is_own():
            needless += (PlacementGroupCleanerCallback,)
        usual = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in usual if not isinstance(callback, needless)]


def build_trainer(
    experiment: Experiment,
    folder: RunFolder,
    data: Data,
    log: Any,
    callbacks: Sequence[UserCallback] = (),
    session: WorkerSession | None = None,
) -> TorchTrainer:
    """The one builder of training runs: a single run and a trial of a sweep both come from here.

    With a `session` the one worker runs in this process, and tells the session.
    """
    workers = worker_resources(experiment.scale)
    elastic = workers.least != workers.most
    count = (workers.least, workers.most) if elastic else workers.most
    return LeanTrainer(
        train_worker,
        train_loop_config={
            "experiment": experiment.model_dump(mode="json"),
            "labels": data.labels,
            "keys": data.keys,
            "log": log,
            "session": session,
            "folder": None if session else folder.storage_path,
        },
        scaling_config=ScalingConfig(
            num_workers=0 if session else count,  # type: ignore[arg-type]
            use_gpu=workers.use_gpu,
            resources_per_worker=workers.each,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]
            name=experiment.name,
            storage_path=folder.storage_path,
            failure_config=FailureConfig(max_failures=experiment.scale.max_failures),
            # Each checkpoint carries the best weights so far, so the latest is all that is needed.
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=list(callbacks),
        ),
    )


def explain(error: TrainingFailedError | RayActorError, folder: RunFolder) -> str:
    """Why training failed, in the words of the worker that began it, or of what leads them."""
    failures = getattr(error, "worker_failures", {})
    rank, cause = min(failures.items(), key=_place, default=(None, error))
    where = f"worker {rank}: " if rank is not None else ""
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    resume = f"run the same command to resume {folder.title} from its last checkpoint."
    for line in reversed(lines):
        if any(sign in line for sign in FULL_DISK):
            return f"the disk is full: {where}{line}\nFree some space, then {resume}"
        if CheckpointManagerInitializationError.__name__ in line:
            return (
                f"{folder.title}: the record of its checkpoints cannot be used: {lines[-1]}\n"
                "Give this run a name of its own (--set name=…), or remove that folder."
            )
    if isinstance(error, RayActorError):
        return f"training broke off: {lines[-1]}\nTo go on, {resume}"
    return (
        f"training failed after its retries (scale.max_failures). {where}{lines[-1]}\n"
        f"To go on, {resume}"
    )


def _place(failure: tuple[int, Exception]) -> int:
    """Where a worker's failure stands among those that may have led to the others."""
    told = str(failure[1])
    if any(sign in told for sign in FULL_DISK):
        return 0
    return 2 if any(sign in told for sign in CUT_OFF) else 1
