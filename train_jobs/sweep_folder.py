"""The folder of one sweep.

sweep.yaml        the sweep as it was started, with the experiment it varies
baselines/ search/         Ray Tune's records of each phase's trials
best-TRIAL/                the same for the best setting, by the trial that found it
trials.csv .parquet        every trial: status, settings, scores, seconds
best.yaml artifact/        the best setting, and what it trains
report.html *.png          everything to look at
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from mtl_core.config import ConfigError, dump_experiment, expand_path
from mtl_core.storage import advise, storage_errors
from train_jobs.locks import check_file, hold_file, hold_object
from train_jobs.runs import LOCK, check_bucket, differences
from train_jobs.sweep import Plan, Sweep

FREE = (
    "sweep.budget.minutes",
    "sweep.budget.concurrency",
    "sweep.output_dir",
    "sweep.set.scale",
    "base.scale",
)
"""What a resumed sweep may change."""


class SweepFolder:
    """A sweep's folder on a local disk or behind an fsspec URL."""

    def __init__(self, sweep: Sweep) -> None:
        import fsspec

        output_dir = expand_path(sweep.output_dir)
        self.filesystem, base = fsspec.core.url_to_fs(output_dir)
        self.is_local = "file" in self.filesystem.protocol
        self.path = f"{base}/{sweep.name}"
        self.name = sweep.name
        url = str(self.filesystem.unstrip_protocol(self.path))
        self.title = self.path if self.is_local else url

    def check(self, plan: Plan) -> bool:
        """Whether this sweep was begun here.

        Raises:
            ConfigError: the folder belongs to another sweep, or is in use.
        """
        try:
            if self.is_local:
                check_file(Path(self.path) / LOCK)
            else:
                check_bucket(self.filesystem, self.path)
            text = self.read("sweep.yaml")
            if text is None:
                if self.filesystem.exists(self.path) and self.filesystem.ls(self.path):
                    raise ConfigError(f"{self.title} holds something else; choose another name")
                return False
        except storage_errors() as error:
            raise ConfigError(f"output_dir: cannot use {self.title}: {advise(error)}") from error
        changed = [
            f"{path} was {old!r}, now {new!r}"
            for path, old, new in differences(yaml.safe_load(text), _plain(plan))
            if not path.startswith(FREE)
        ]
        if changed:
            raise ConfigError(
                f"{self.title} belongs to another sweep:\n  "
                + "\n  ".join(changed[:8])
                + "\nGive this one a name of its own (--set name=…), or remove that folder."
            )
        return True

    @contextmanager
    def claim(self, plan: Plan) -> Iterator[None]:
        """Make the folder this sweep's, and this process's until the block ends.

        Raises:
            ConfigError: another process works in it, or it cannot be written.
        """
        with ExitStack() as held:
            try:
                if self.is_local:
                    self.filesystem.makedirs(self.path, exist_ok=True)
                lock = f"{self.path}/{LOCK}"
                held.enter_context(
                    hold_file(Path(lock)) if self.is_local else hold_object(self.filesystem, lock)
                )
                self.write("sweep.yaml", yaml.safe_dump(_plain(plan), sort_keys=False))
            except storage_errors() as error:
                raise ConfigError(
                    f"output_dir: cannot use {self.title}: {advise(error)}"
                ) from error
            yield

    def is_finished(self, minutes: float | None) -> bool:
        """Whether nothing is left to do for a search of so many minutes."""
        searched = self.read("finished")
        if not searched:
            return searched is not None
        return minutes is not None and minutes <= float(searched)

    def finish(self, minutes: float | None) -> None:
        """Note that all is done: every trial, or what so many minutes of search left time for."""
        self.write("finished", "" if minutes is None else str(minutes))

    def holds(self, pattern: str) -> bool:
        """Whether there is a file of that name, in which * stands for anything."""
        return bool(self.filesystem.glob(f"{self.path}/{pattern}"))

    def write(self, name: str, content: str | bytes) -> None:
        """Replace a file as a whole."""
        data = content.encode() if isinstance(content, str) else content
        if not self.is_local:
            self.filesystem.pipe_file(f"{self.path}/{name}", data)
            return
        partial = Path(f"{self.path}/{name}.partial")
        partial.write_bytes(data)
        partial.rename(f"{self.path}/{name}")

    def read(self, name: str) -> str | None:
        path = f"{self.path}/{name}"
        if not self.filesystem.exists(path):
            return None
        return str(self.filesystem.cat_file(path).decode("utf-8"))


def _plain(plan: Plan) -> dict[str, Any]:
    """A plan as values that YAML holds."""
    text = {"sweep": dump_experiment(plan.sweep), "base": dump_experiment(plan.base)}
    return {name: yaml.safe_load(part) for name, part in text.items()}
