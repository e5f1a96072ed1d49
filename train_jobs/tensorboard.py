"""Metrics as TensorBoard events, beside metrics.jsonl."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from train_jobs.runs import RunFolder


class TensorBoard:
    """Writes every number of a progress row; to a URL, when the run ends.

    Writes happen in the caller's thread: the usual SummaryWriter queues them for a thread of its
    own, which dies on a full disk and then blocks its producer for good.
    """

    def __init__(self, folder: RunFolder) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        self.folder = folder
        self.local = f"{folder.path}/tensorboard" if folder.is_local else tempfile.mkdtemp()
        Path(self.local).mkdir(parents=True, exist_ok=True)
        self.writer = EventsWriter(f"{self.local}/events")

    def add(self, row: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        ]
        event = Event(wall_time=time.time(), step=row.get("step", 0), summary=Summary(value=values))
        self.writer.write_event(event)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
        if not self.folder.is_local:
            target = f"{self.folder.path}/tensorboard"
            self.folder.filesystem.put(self.local, target, recursive=True)
