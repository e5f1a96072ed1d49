"""Files of a source: a path or URL, or a folder with one file a split, opened through fsspec."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mtl_core.config import Format, SourceConfig, Split, expand_path
from mtl_core.data.formats import SUFFIXES, Column, Table, format_of, parse_table
from mtl_core.errors import DataError, there_is

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""What files (before the first dot) and Hub splits are called, by the split they are for."""


@dataclass(frozen=True)
class File:
    """One split's file, found but not read."""

    filesystem: Any
    location: str
    """Its path within the filesystem."""
    title: str
    """Its name in messages."""
    format: Format | None
    """As the source or the name tells it."""

    def known_format(self) -> Format:
        """DataError where nothing tells it."""
        if self.format is None:
            known = ", ".join(dict.fromkeys(SUFFIXES.values()))
            problem = "the name tells no format; add `format:`, one of"
            raise DataError(f"{self.title}: {problem} {known}")
        return self.format


def find_files(source: SourceConfig, splits: Iterable[Split], single: Split) -> dict[Split, File]:
    """The files of the splits that are there; a file on its own is the split `single`.

    In a folder, `source.splits` names files and the other splits are found by their names.

    Raises:
        DataError: no such folder, or no train split in it.
    """
    import fsspec

    path = expand_path(source.path or "")
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        names = None
        if format_of(root) is None and filesystem.isdir(root):
            found = (posixpath.basename(str(item)) for item in filesystem.ls(root, detail=False))
            names = sorted(name for name in found if name)
    except Exception as error:  # every filesystem raises its own
        raise DataError(f"{path}: cannot be opened ({error})") from error
    files: dict[Split, File] = {}
    for split in splits:
        if names is None:
            name = _single(source, split == single)
        else:
            name = _in_folder(source, split, path, names)
        if name is not None:
            title = posixpath.join(path, name) if name else path
            location = posixpath.join(root, name) if name else root
            files[split] = File(filesystem, location, title, source.format or format_of(title))
    return files


def read_files(
    source: SourceConfig, splits: Iterable[Split], wanted: Sequence[Column], single: Split
) -> dict[Split, Table]:
    """Read the splits that `find_files` finds.

    Raises:
        DataError: no such file, or one that cannot be read or has no rows.
    """
    tables: dict[Split, Table] = {}
    for split, file in find_files(source, splits, single).items():
        data = read_file(file)
        kind = file.known_format()
        tables[split] = parse_table(data, file.title, kind, source.encoding, wanted)
        if not tables[split].rows:
            raise DataError(f"{file.title}: the file has no rows")
    return tables


def _single(source: SourceConfig, wanted: bool) -> str | None:
    if source.splits:
        raise DataError(
            f"{source.path}: `splits` names files of a folder, and this is none; "
            "give the folder as `path`"
        )
    return "" if wanted else None


def _in_folder(source: SourceConfig, split: Split, path: str, names: Sequence[str]) -> str | None:
    """The split's file in the folder; None where it has none."""
    if split in source.splits:
        return source.splits[split]
    found = [
        name
        for name in names
        if name.split(".")[0].lower() in SPLIT_NAMES[split] and (source.format or format_of(name))
    ]
    if len(found) > 1:
        raise DataError(
            f"{path}: {' and '.join(found)} could both be {split}; "
            f"name one: `splits: {{{split}: {found[0]}}}`"
        )
    if not found and split == "train":
        raise DataError(
            f"{path}: no train split; name its file: `splits: {{train: <file>}}`; "
            + there_is(names, "train")
        )
    return found[0] if found else None


def read_file(file: File, start: int = 0, end: int | None = None) -> bytes:
    """The whole file, decompressed, or with an end its bytes from `start` to there as they are.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    try:
        if end is not None:
            return bytes(file.filesystem.cat_file(file.location, start=start, end=end))
        with file.filesystem.open(file.location, "rb", compression="infer") as opened:
            return bytes(opened.read())
    except FileNotFoundError as error:
        hint = _beside(file.filesystem, file.location)
        raise DataError(f"{file.title}: no such file or folder{hint}") from error
    except Exception as error:  # every filesystem raises its own
        raise DataError(f"{file.title}: cannot be read ({error})") from error


def _beside(filesystem: Any, location: str) -> str:
    """What stands in the same folder, for the message about a file that is not there."""
    folder, name = posixpath.split(location)
    try:
        paths = sorted(str(item) for item in filesystem.ls(folder, detail=False))
    except Exception:  # only a hint
        return ""
    names = [posixpath.basename(path) for path in paths]
    return f"; in its folder: {there_is(names, name)}"
