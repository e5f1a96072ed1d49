"""Where the cache and sockets are; folders written whole, copied or locked; hashes of files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtl_core.errors import ConfigError

MAX_SOCKET_ROOT = 21
"""What HAProxy takes for a socket's path, 97 bytes, less /mtl-…, a node's id, and /admin."""


def cache_root() -> Path:
    """Where what can be made again is kept: MTL_CACHE, else the user's cache folder.

    Raises:
        ConfigError: there is neither.
    """
    if chosen := os.environ.get("MTL_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multitask-ray"
    except RuntimeError as error:
        raise ConfigError("there is no home folder: set MTL_CACHE to one for the cache") from error


def holds_cache(path: str) -> bool:
    """Whether a path is in the cache, or one of the folders that the cache is in."""
    cache = cache_root()
    return Path(path).is_relative_to(cache) or cache.is_relative_to(path)


def socket_root() -> str:
    """Where folders with sockets go: RAY_TMPDIR, as Ray's own do, or /tmp if that is too long."""
    folder = os.path.abspath(os.environ.get("RAY_TMPDIR") or "/tmp")
    if len(os.fsencode(folder)) > MAX_SOCKET_ROOT:
        return "/tmp"
    os.makedirs(folder, exist_ok=True)
    return folder


@contextmanager
def atomic_folder(folder: Path, replace: bool = True) -> Iterator[Path]:
    """A temporary sibling that takes `folder`'s place when the block ends without an error.

    An older folder of that name stays until the new one is whole. Unless it is to `replace` one, it
    stays for good: another process was first.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        # Else a name may outlive a power cut, and what is in the file not.
        for path in filter(Path.is_file, partial.rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        retired = partial.with_suffix(".old")
        if replace and folder.exists():
            folder.rename(retired)
        try:
            partial.rename(folder)
        except OSError:
            if retired.exists():
                retired.rename(folder)
            if replace or not folder.exists():
                raise
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[bool]:
    """Wait for other processes that are in a block of this lock file; it goes with its holder.

    Yields whether there are locks: a file system without them only costs the work twice.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        held = False
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
            held = True
        yield held


def copy_tree(source: str | Path, target: Path) -> None:
    """Copy a folder's content into an existing one; hard links where the disk allows."""

    def link(src: str, dst: str) -> str:
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)
        return dst

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
