"""metrics as TensorBoard events, beside metrics.jsonl."""

from __future__ import annotations

import tempfile
from typing import Any

from train_jobs.runs import RunFolder


class TensorBoard:
    """Writes every number of a progress row; to a URL, when the run ends."""

    def __init__(self, folder: RunFolder) -> None:
        from tensorboardX import SummaryWriter

        self.folder = folder
        self.local = f"{folder.path}/tensorboard" if folder.is_local else tempfile.mkdtemp()
        self.writer = SummaryWriter(self.local)

    def add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self.writer.add_scalar(name, value, row.get("step", 0))

    def close(self) -> None:
        self.writer.close()
        if not self.folder.is_local:
            self.folder.filesystem.put(
                self.local, f"{self.folder.path}/tensorboard", recursive=True
            )
