"""python -m train_jobs.train: from an experiment file to an artifact, on Ray Train."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
)
from ray.train.v2.api.exceptions import TrainingFailedError

from mtl_core.artifact import read_manifest
from mtl_core.build import inherit
from mtl_core.command import run_command
from mtl_core.config import Experiment, load_experiment
from mtl_core.data.prepare import Data, prepare
from mtl_core.loop import TrainingError
from train_jobs.cluster import ray_cluster, worker_resources
from train_jobs.console import Progress, label_table, score_table
from train_jobs.nodes import wait_for_nodes
from train_jobs.report import build_artifact, history_until, read_report
from train_jobs.runs import RunFolder
from train_jobs.tensorboard import TensorBoard
from train_jobs.worker import WorkerSession, train_worker

EPILOG = """examples:
  python -m train_jobs.train --config train_jobs/configs/demo.yaml
  python -m train_jobs.train --config my.yaml --set training.epochs=5 --set scale.workers=2

Running the same name again resumes it from its last checkpoint; a finished run is shown, not
repeated. Every key of the file is explained in docs/usage.md."""


@ray.remote(num_cpus=0)
class ProgressLog:
    """Carries progress from the first worker to the driver."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, dict[str, Any]]] = []

    def append(self, event: str, row: dict[str, Any]) -> None:
        self.rows.append((event, row))

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        rows, self.rows = self.rows, []
        return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train_jobs.train",
        description="Train one encoder for many tasks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="experiment file (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one field by its dotted path; may be repeated",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="insist on resuming: fail if there is no run of this name",
    )
    options = parser.parse_args(arguments)
    experiment = inherit(load_experiment(options.config, options.set))
    folder = RunFolder(experiment)
    resumed = folder.resumes(experiment, must_exist=options.resume)
    if folder.is_finished:
        print(f"{folder.title} is finished; its scores:")
        show_result(folder)
        return
    if resumed:
        print(f"resuming {folder.title}")
    train(experiment, folder)
    show_result(folder)


def train(experiment: Experiment, folder: RunFolder) -> None:
    """Run an experiment to its end and leave the artifact in its folder.

    Raises:
        TrainingError: training cannot go on.
        DataError, EncoderError, ConfigError: before any worker starts.
    """
    started = time.monotonic()
    data = prepare(experiment)
    describe_data(data)
    with folder.claim(experiment), ray_cluster():
        wait_for_nodes(experiment.scale, print)
        log = ProgressLog.remote()  # type: ignore[attr-defined]
        trainer = build_trainer(experiment, folder, data, log)
        follower = _Follower(experiment, folder, log)
        with follower:
            try:
                result = trainer.fit()
            except TrainingFailedError as error:
                raise TrainingError(explain(error, folder)) from error
            except SystemExit as stop:  # what Ray Train turns Ctrl-C into
                raise KeyboardInterrupt from stop
        if follower.failure is not None:
            raise TrainingError(follower.failure)
        assert result.checkpoint is not None
        with result.checkpoint.as_directory() as weights:
            build_artifact(Path(weights), experiment, data, folder, time.monotonic() - started)


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
    workers, use_gpu, resources = worker_resources(experiment.scale)
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "experiment": experiment.model_dump(mode="json"),
            "labels": data.labels,
            "keys": data.keys,
            "log": log,
            "session": session,
        },
        scaling_config=ScalingConfig(
            num_workers=0 if session else workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=resources,
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


class _Follower:
    """Shows and stores the workers' progress while the driver waits for them."""

    def __init__(self, experiment: Experiment, folder: RunFolder, log: Any) -> None:
        self.folder, self.log = folder, log
        self.progress = Progress(experiment.training.epochs, list(experiment.tasks))
        self.history = folder.history()
        self.board = TensorBoard(folder)
        self.failure: str | None = None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> _Follower:
        self.progress.__enter__()
        self.thread.start()
        return self

    def __exit__(self, *details: Any) -> None:
        self.done.set()
        self.thread.join()
        self.progress.__exit__(*details)
        with contextlib.suppress(OSError):  # the run itself says that the disk is full
            self.board.close()

    def _follow(self) -> None:
        last = False
        while not last:
            last = self.done.wait(0.5)
            try:
                rows = ray.get(self.log.drain.remote(), timeout=10)
            except Exception:
                continue
            for event, row in rows:
                self._take(event, row)
            if rows:
                self._store(rows)

    def _store(self, rows: list[tuple[str, dict[str, Any]]]) -> None:
        """A full disk must not end a run that may still have room for its checkpoints."""
        try:
            self.folder.write_history(self.history)
            for event, row in rows:
                if event in ("step", "validation"):
                    self.board.add(row)
            self.board.flush()
        except OSError as error:
            self.progress.note(f"metrics.jsonl cannot be written ({error}); trying again later")

    def _take(self, event: str, row: dict[str, Any]) -> None:
        self.progress.show(event, row)
        if event == "start":
            # What came after the checkpoint that workers go on from will come again.
            self.history = history_until(self.history, row["step"])
        if event == "failed":
            self.failure = row["message"]
        self.history.append({"event": event, **row})


def explain(error: TrainingFailedError, folder: RunFolder) -> str:
    """Why the workers failed, in the words of the first of them."""
    failures = getattr(error, "worker_failures", {})
    rank, cause = next(iter(failures.items()), (None, error))
    where = f"worker {rank}: " if rank is not None else ""
    text = str(cause).strip()
    if "No space left on device" in text or "Errno 28" in text:
        return (
            f"the disk is full while a checkpoint was written to {folder.title}; the one before it "
            "is whole. Free some space and run the same command to resume."
        )
    last = text.splitlines()[-1] if text else type(cause).__name__
    return (
        f"training failed after its retries (scale.max_failures). {where}{last}\n"
        f"Run the same command to resume {folder.title} from its last checkpoint."
    )


def describe_data(data: Data) -> None:
    """Say what will be learned from what."""
    for name, split in data.splits.items():
        rows = ", ".join(f"{task} {int(p.sum())}" for task, p in split.present.items())
        cut = f"; {split.num_truncated} cut at the length limit" if split.num_truncated else ""
        print(f"{name}: {len(split)} texts ({rows}), {len(split.input_ids)} tokens{cut}")
    for source, count in data.skipped.items():
        print(f"{source}: {count} unreadable row(s) skipped")


def show_result(folder: RunFolder) -> None:
    """Print the artifact's scores and where to go from here."""
    from rich.console import Console

    console = Console(highlight=False)
    with folder.artifact_to_show() as artifact:
        manifest = read_manifest(artifact, check_files=False)
        reports = list(read_report(artifact))
    if not manifest.training.get("trained", True):
        console.print(
            "Nothing was trained: every part is frozen. These are the scores as it stood."
        )
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for task, info in manifest.tasks.items():
        for split, values in info["metrics"].items():
            scores.setdefault(split, {})[task] = values
    console.print(score_table(f"{manifest.name}: scores", scores))
    for title, rows in reports:
        if len(rows) <= 12:
            console.print(label_table(title, rows))
    where = f"{folder.title}/artifact"
    if folder.is_local and not os.path.relpath(where).startswith(".."):
        where = os.path.relpath(where)
    print(f"artifact: {where}  (plots in plots/, all numbers in report.json)")
    print(f'next:     python -m train_jobs.predict --artifact {shlex.quote(where)} --text "…"')


if __name__ == "__main__":
    run_command(main)
