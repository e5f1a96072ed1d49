"""The folder of one run: what is in it, whose it is, and how it fills without ever being half-done.

experiment.yaml   the configuration the run was started with
metrics.jsonl     every progress event
tensorboard/      the same for TensorBoard
run.lock          who trains here now (train_jobs.locks)
checkpoint_*/     Ray Train's checkpoints
artifact/         the result (mtl_core.artifact)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from mtl_core.config import Experiment, dump_experiment
from mtl_core.errors import ConfigError
from mtl_core.folders import atomic_folder, copy_tree
from train_jobs.folders import NamedFolder, differences

MACHINE_FIELDS = ("scale", "output_dir")
"""Parts of an experiment that a resumed run may change: they do not change what it computes."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's record of the checkpoints; it refuses to start where one of them is gone."""
RESULT = "result.json"
"""What the workers add to the last checkpoint: scores and counts of the run."""


class RunFolder(NamedFolder):
    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment.output_dir, experiment.name)

    @property
    def artifact(self) -> str:
        return f"{self.path}/artifact"

    def resumes(self, experiment: Experiment, must_exist: bool = False) -> bool:
        """Whether there is an earlier run of this experiment to go on from, or to show.

        A folder that holds neither checkpoint nor artifact has nothing to lose and is free.

        Raises:
            ConfigError: the folder belongs to a run with another configuration, is in use by
                another process, cannot be read, or holds no run although `must_exist`.
        """
        with self.in_words():
            self.check_free()
            there = self._is_of(experiment)
        if must_exist and not there:
            raise ConfigError(f"--resume: {self.title} holds no run; start it without --resume")
        return there

    @contextmanager
    def claim(self, experiment: Experiment) -> Iterator[None]:
        """Make the folder this experiment's, and this process's until the block ends.

        Raises:
            ConfigError: another process trains in it, another configuration has since been trained
                in it, or it cannot be written.
        """
        with ExitStack() as block:
            with self.in_words():
                block.enter_context(self.held())
                self._is_of(experiment)  # asked again: from now on nobody else changes it
                if not self._holds_weights():
                    self.write_history([])
                    self.remove(SNAPSHOT)
                self.write("experiment.yaml", dump_experiment(experiment))
            yield

    def _is_of(self, experiment: Experiment) -> bool:
        """Whether the folder holds a run, after checking that it is this experiment's."""
        earlier = self.read("experiment.yaml") if self._holds_weights() else None
        if earlier is None:
            return False
        found = differences(yaml.safe_load(earlier), yaml.safe_load(dump_experiment(experiment)))
        changed = [each for each in found if each[0].split(".")[0] not in MACHINE_FIELDS]
        self.refuse_other("a run with another configuration", changed)
        return True

    def _holds_weights(self) -> bool:
        if not self.filesystem.exists(self.path):
            return False
        names = [Path(path).name for path in self.filesystem.ls(self.path, detail=False)]
        return any(name == "artifact" or name.startswith("checkpoint_2") for name in names)

    @property
    def is_finished(self) -> bool:
        return bool(self.filesystem.exists(f"{self.artifact}/manifest.json"))

    def history(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl; a last line that a crash cut short is dropped."""
        rows = []
        for line in (self.read("metrics.jsonl") or "").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def write_history(self, rows: Iterable[dict[str, Any]]) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def publish(self, folder: Path) -> None:
        """Make `folder` the run's artifact, whole or not at all."""
        if self.is_local:
            with atomic_folder(Path(self.artifact)) as partial:
                copy_tree(folder, partial)
            return
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        # An object store knows no rename: the manifest, which makes it an artifact, goes last.
        for path in sorted(paths, key=lambda p: p.name == "manifest.json"):
            target = f"{self.artifact}/{path.relative_to(folder).as_posix()}"
            self.filesystem.put_file(str(path), target)


def take(history: list[dict[str, Any]], event: str, row: Mapping[str, Any]) -> None:
    """Add a progress event to a history's rows.

    What came after the checkpoint that workers go on from will come again.
    """
    if event == "start":
        history[:] = [earlier for earlier in history if earlier.get("step", 0) <= row["step"]]
    history.append({"event": event, **row})
