"""The folder of one sweep.

sweep.yaml        the sweep as it was started, the experiment it varies, keys of the texts
baselines/ search/         Ray Tune's records of each phase's trials
best-TRIAL/                the same for the best setting, by the trial that found it
workers/                   what each trial told; checkpoints of those with several workers
trials.csv .parquet        every trial: status, settings, scores, seconds
best.yaml artifact/        the best setting, and what it trains
report.html *.png          everything to look at
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from mtl_core.config import dump_experiment
from mtl_core.errors import ConfigError, DataError
from train_jobs.folders import LOCK, NamedFolder, differences
from train_jobs.runs import MACHINE_FIELDS
from train_jobs.sweep import Plan, Sweep

FREE = (
    "sweep.budget.minutes",
    "sweep.budget.concurrency",
    "sweep.output_dir",
    "sweep.set.scale",
    "base.scale",
)
"""What a resumed sweep may change."""
FINISHED = "finished"
"""Stands where all is done; in it, the minutes that the search was cut off at."""


class SweepFolder(NamedFolder):
    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep.output_dir, sweep.name)

    def check(self, plan: Plan) -> bool:
        """Whether this sweep was begun here.

        Raises:
            ConfigError: the folder belongs to another sweep, or is in use.
        """
        with self.in_words():
            self.check_free()
            begun = self._is_of(plan)
            if not begun and self._holds_other():
                raise ConfigError(f"{self.title} holds something else; choose another name")
        return begun

    def _holds_other(self) -> bool:
        """Whether anything is here but what a first start that broke off leaves."""
        if not self.filesystem.exists(self.path):
            return False
        names = {Path(path).name for path in self.filesystem.ls(self.path, detail=False)}
        return bool(names - {LOCK, "sweep.yaml.partial"})

    @contextmanager
    def claim(self, plan: Plan, keys: Mapping[str, str] | None = None) -> Iterator[None]:
        """Make the folder this sweep's, and this process's until the block ends.

        Args:
            plan: the sweep.
            keys: of its base experiment's encoded splits.

        Raises:
            ConfigError: another process works in it, another sweep has since begun in it, or it
                cannot be written.
            DataError: the sweep was begun with other texts.
        """
        with ExitStack() as block:
            with self.in_words():
                block.enter_context(self.held())
                self._is_of(plan)  # asked again: from now on nobody else changes it
                self._check_texts(keys or {})
                content = {**_plain(plan), "texts": dict(keys or {})}
                self.write("sweep.yaml", yaml.safe_dump(content, sort_keys=False))
                self.remove(FINISHED)  # until all of it is done again
            yield

    def _is_of(self, plan: Plan) -> bool:
        """Whether a sweep was begun here, after checking that it is this one."""
        earlier = self.read("sweep.yaml")
        if earlier is None:
            return False
        known = yaml.safe_load(earlier)
        known.pop("texts", None)  # for `claim` to look at, when they were read
        found = differences(known, _plain(plan))
        self.refuse_other("another sweep", [d for d in found if not d[0].startswith(FREE)])
        return True

    def _check_texts(self, keys: Mapping[str, str]) -> None:
        """Raise DataError if trials were begun with other texts; old sweeps tell no keys."""
        begun = self.holds("*/experiment_state-*.json")
        known = yaml.safe_load(self.read("sweep.yaml") or "{}").get("texts") if begun else None
        known = known or keys
        changed = [split for split in {**known, **keys} if known.get(split) != keys.get(split)]
        if changed:
            raise DataError(
                f"{', '.join(changed)}: texts, labels or tokenizer have changed since {self.title} "
                "began; put them back, or start a sweep of another name"
            )

    def is_finished(self, minutes: float | None) -> bool:
        """Whether nothing is left to do for a search of so many minutes."""
        searched = self.read(FINISHED)
        if not searched:
            return searched is not None
        return minutes is not None and minutes <= float(searched)

    def finish(self, minutes: float | None) -> None:
        """Note that all is done: every trial, or what so many minutes of search left time for."""
        self.write(FINISHED, "" if minutes is None else str(minutes))

    def set_best(self, experiment: str) -> None:
        """Write best.yaml; an artifact of another setting goes."""
        trained = self.read("artifact/experiment.yaml") or experiment
        changed = differences(yaml.safe_load(trained), yaml.safe_load(experiment))
        if any(path.split(".")[0] not in MACHINE_FIELDS for path, *_ in changed):
            self.filesystem.rm(f"{self.path}/artifact", recursive=True)
        self.write("best.yaml", experiment)

    def holds(self, pattern: str) -> bool:
        """Whether there is a file of that name, in which * stands for anything."""
        return bool(self.filesystem.glob(f"{self.path}/{pattern}"))


def _plain(plan: Plan) -> dict[str, Any]:
    """A plan as values that YAML holds."""
    text = {"sweep": dump_experiment(plan.sweep), "base": dump_experiment(plan.base)}
    return {name: yaml.safe_load(part) for name, part in text.items()}
