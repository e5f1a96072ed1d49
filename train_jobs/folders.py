"""A folder that commands share: where it is, whose it is, and one driver in it at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtl_core.config import expand_path
from mtl_core.errors import ConfigError
from mtl_core.storage import advise, storage_errors
from train_jobs.locks import check_file, hold_file, hold_object

LOCK = "run.lock"


class NamedFolder:
    """The folder of a name on a local disk or behind an fsspec URL."""

    def __init__(self, output_dir: str, name: str) -> None:
        import fsspec

        output_dir = expand_path(output_dir)
        self.filesystem, self.base = fsspec.core.url_to_fs(output_dir)
        self.is_local = "file" in self.filesystem.protocol
        self.name = name
        self.storage_path = self.base if self.is_local else output_dir
        self.path = f"{self.base}/{name}"

    @property
    def title(self) -> str:
        """How messages call this folder: its path, or its URL."""
        return self.path if self.is_local else str(self.filesystem.unstrip_protocol(self.path))

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """Say what went wrong with storage.

        Raises:
            ConfigError: something did.
        """
        try:
            yield
        except storage_errors() as error:
            raise ConfigError(f"output_dir: cannot use {self.title}: {advise(error)}") from error

    def check_free(self) -> None:
        """Raise ConfigError if another process works here, FileNotFoundError without a bucket."""
        if self.is_local:
            check_file(Path(self.path) / LOCK)
        else:
            check_bucket(self.filesystem, self.base)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others out until the block ends; a local folder is made.

        Raises:
            ConfigError: another process works here.
        """
        lock = f"{self.path}/{LOCK}"
        if self.is_local:
            self.filesystem.makedirs(self.path, exist_ok=True)
        with hold_file(Path(lock)) if self.is_local else hold_object(self.filesystem, lock):
            yield

    def refuse_other(self, other: str, changed: Sequence[tuple[str, Any, Any]]) -> None:
        """Raise ConfigError if anything differs from what the folder was begun with."""
        if changed:
            told = [f"{path} was {old!r}, now {new!r}" for path, old, new in changed[:8]]
            raise ConfigError(
                "\n  ".join([f"{self.title} belongs to {other}:", *told])
                + "\nGive this one a name of its own (--set name=…), or remove that folder."
            )

    def write(self, name: str, content: str | bytes) -> None:
        """Replace a small file as a whole."""
        data = content.encode() if isinstance(content, str) else content
        path = f"{self.path}/{name}"
        if not self.is_local:
            self.filesystem.pipe_file(path, data)
            return
        partial = Path(f"{path}.partial")
        partial.write_bytes(data)
        partial.rename(path)

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        if self.filesystem.exists(f"{self.path}/{name}"):
            self.filesystem.rm_file(f"{self.path}/{name}")

    def read(self, name: str) -> str | None:
        path = f"{self.path}/{name}"
        if not self.filesystem.exists(path):
            return None
        return str(self.filesystem.cat_file(path).decode("utf-8"))


def out_of_reach(node: str, folder: str, reason: str = "") -> ConfigError:
    """What to say of a node that does not find in a folder what the driver wrote there."""
    return ConfigError(
        f"output_dir: node {node} of this cluster does not reach {folder}{reason}; give storage "
        "that every node reaches: s3://bucket/runs, or a mounted folder"
    )


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


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted path, old and new value of everything that differs between two plain structures."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [(path, old, new)]
