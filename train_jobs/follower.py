"""A thread of the driver that polls workers' progress, shows it and stores it."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from mtl_core.config import Experiment
from mtl_core.storage import storage_errors
from train_jobs.console import Progress
from train_jobs.runs import RunFolder, take
from train_jobs.tensorboard import TensorBoard

PAUSE_SECONDS = 5.0
"""Before what could not be written is tried again."""


class Follower:
    def __init__(self, experiment: Experiment, folder: RunFolder, log: Any) -> None:
        self.folder, self.log = folder, log
        kinds = {task: config.kind for task, config in experiment.tasks.items()}
        self.progress = Progress(experiment.training.epochs, kinds)
        self.history = folder.history()
        self.board = TensorBoard(folder)
        self.failure: str | None = None
        self.asked: Any = None
        """The log's answer to come."""
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self.progress.__enter__()
        self.thread.start()
        return self

    def __exit__(self, *details: Any) -> None:
        self.done.set()
        self.thread.join()
        self.progress.__exit__(*details)
        with contextlib.suppress(*storage_errors()):  # the run itself says that the disk is full
            self.board.close()

    def _follow(self) -> None:
        rows: list[tuple[str, dict[str, Any]]] = []
        last, rest = False, 0.0
        while not last:
            last = self.done.wait(0.5)
            new = self._told()
            if last:
                new += self._told()  # since an answer that came late was asked for
            for event, row in new:
                self._take(event, row)
            rows += new
            # The file is written anew each time, which takes the longer the longer a run is.
            if rows and (last or time.monotonic() > rest):
                started = time.monotonic()
                self._store(rows)
                rest = time.monotonic() + 20 * (time.monotonic() - started)
                rest += PAUSE_SECONDS if rows else 0

    def _told(self) -> list[tuple[str, dict[str, Any]]]:
        """What the log has been told; it forgets that, so a late answer is waited for again."""
        try:
            if self.asked is None:
                self.asked = self.log.drain.remote()
            new: list[tuple[str, dict[str, Any]]] = ray.get(self.asked, timeout=10)
        except GetTimeoutError:
            return []
        except Exception:
            new = []
        self.asked = None
        return new

    def _store(self, rows: list[tuple[str, dict[str, Any]]]) -> None:
        """Write the history, and these rows, which stay in the list if they cannot be written.

        Neither a full disk nor a store that does not answer must end a run that may still have room
        for its checkpoints.
        """
        try:
            self.folder.write_history(self.history)
            while rows:
                event, row = rows[0]
                if event in ("step", "validation"):
                    self.board.add(row)
                del rows[0]
            self.board.flush()
        except storage_errors() as error:
            self.progress.note(f"metrics.jsonl cannot be written ({error}); trying again later")

    def _take(self, event: str, row: dict[str, Any]) -> None:
        self.progress.show(event, row)
        take(self.history, event, row)
        if event == "failed" and self.failure is None:
            self.failure = row["message"]
