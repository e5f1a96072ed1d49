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
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from mtl_core.config import ConfigError, Experiment, dump_experiment, expand_path
from mtl_core.folders import atomic_folder, copy_tree
from mtl_core.storage import advise, storage_errors
from train_jobs.locks import check_file, hold_file, hold_object

MACHINE_FIELDS = ("scale", "output_dir")
"""Parts of an experiment that a resumed run may change: they do not change what it computes."""
LOCK = "run.lock"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's record of the checkpoints; it refuses to start where one of them is gone."""
RESULT = "result.json"
"""What the workers add to the last checkpoint: scores and counts of the run."""


def check_bucket(filesystem: Any, path: str) -> None:
    """Raise FileNotFoundError if a path's bucket is not there.

    s3fs would make one that a misspelt name asks for.
    """
    if "s3" not in filesystem.protocol:
        return
    bucket = path.split("/")[0]
    try:
        filesystem.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no bucket {bucket!r}") from error


class RunFolder:
    """A run's folder on a local disk or behind an fsspec URL."""

    def __init__(self, experiment: Experiment) -> None:
        import fsspec

        output_dir = expand_path(experiment.output_dir)
        self.filesystem, self.base = fsspec.core.url_to_fs(output_dir)
        self.is_local = "file" in self.filesystem.protocol
        self.name = experiment.name
        self.storage_path = self.base if self.is_local else output_dir
        self.path = f"{self.base}/{self.name}"

    @property
    def title(self) -> str:
        """How messages call this folder: its path, or its URL."""
        return self.path if self.is_local else str(self.filesystem.unstrip_protocol(self.path))

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
        try:
            if self.is_local:
                check_file(Path(self.path) / LOCK)
            else:
                check_bucket(self.filesystem, self.base)
            there = self._is_of(experiment)
        except storage_errors() as error:
            raise ConfigError(f"output_dir: cannot use {self.title}: {advise(error)}") from error
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
        with ExitStack() as held:
            try:
                if self.is_local:
                    self.filesystem.makedirs(self.path, exist_ok=True)
                lock = f"{self.path}/{LOCK}"
                held.enter_context(
                    hold_file(Path(lock)) if self.is_local else hold_object(self.filesystem, lock)
                )
                self._is_of(experiment)  # asked again: from now on nobody else changes it
                if not self._holds_weights():
                    self.write_history([])
                    self._remove(SNAPSHOT)
                self.write("experiment.yaml", dump_experiment(experiment))
            except storage_errors() as error:
                raise ConfigError(
                    f"output_dir: cannot use {self.title}: {advise(error)}"
                ) from error
            yield

    def _is_of(self, experiment: Experiment) -> bool:
        """Whether the folder holds a run, after checking that it is this experiment's."""
        earlier = self._read("experiment.yaml") if self._holds_weights() else None
        if earlier is not None:
            self._check_same(yaml.safe_load(earlier), experiment)
        return earlier is not None

    def _holds_weights(self) -> bool:
        if not self.filesystem.exists(self.path):
            return False
        names = [Path(path).name for path in self.filesystem.ls(self.path, detail=False)]
        return any(name == "artifact" or name.startswith("checkpoint_2") for name in names)

    def _check_same(self, earlier: Any, experiment: Experiment) -> None:
        now = yaml.safe_load(dump_experiment(experiment))
        changed = [
            f"{path} was {old!r}, now {new!r}"
            for path, old, new in differences(earlier, now)
            if path.split(".")[0] not in MACHINE_FIELDS
        ]
        if changed:
            raise ConfigError(
                f"{self.title} belongs to a run with another configuration:\n  "
                + "\n  ".join(changed[:8])
                + "\nGive this one a name of its own (--set name=…), or remove that folder."
            )

    @property
    def is_finished(self) -> bool:
        return bool(self.filesystem.exists(f"{self.artifact}/manifest.json"))

    def write(self, name: str, text: str) -> None:
        """Replace a small file as a whole."""
        path = f"{self.path}/{name}"
        if self.is_local:
            partial = Path(f"{path}.partial")
            partial.write_text(text, encoding="utf-8")
            partial.rename(path)
        else:
            self.filesystem.pipe_file(path, text.encode())

    def _remove(self, name: str) -> None:
        if self.filesystem.exists(f"{self.path}/{name}"):
            self.filesystem.rm_file(f"{self.path}/{name}")

    def _read(self, name: str) -> str | None:
        path = f"{self.path}/{name}"
        if not self.filesystem.exists(path):
            return None
        return str(self.filesystem.cat_file(path).decode("utf-8"))

    def history(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl; a last line that a crash cut short is dropped."""
        rows = []
        for line in (self._read("metrics.jsonl") or "").splitlines():
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

    @contextmanager
    def artifact_to_show(self) -> Iterator[str]:
        """A folder on this machine with what the artifact says of itself, without its weights."""
        if self.is_local:
            yield self.artifact
            return
        with tempfile.TemporaryDirectory() as folder:
            for name in ("manifest.json", "report.json"):
                self.filesystem.get_file(f"{self.artifact}/{name}", f"{folder}/{name}")
            yield folder


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted path, old and new value of everything that differs between two plain structures."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [(path, old, new)]
