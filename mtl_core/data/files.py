"""Files of a source: a path or URL, or a folder with one file a split, opened through fsspec."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from typing import Any

from mtl_core.config import SourceConfig, Split, expand_path
from mtl_core.data.examples import DataError
from mtl_core.data.formats import SUFFIXES, Column, Table, format_of, parse_table, there_is

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""What files (before the first dot) and Hub splits are called, by the split they are for."""


def read_files(
    source: SourceConfig, splits: Iterable[Split], wanted: Sequence[Column], single: Split
) -> dict[Split, Table]:
    """Read the splits that are there; a file on its own is the split `single`.

    In a folder, `source.splits` names files and the other splits are found by their names.

    Raises:
        DataError: no such file or folder, no train split, or a file that cannot be read.
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
    tables: dict[Split, Table] = {}
    for split in splits:
        if names is None:
            name = _single(source, split == single)
        else:
            name = _in_folder(source, split, path, names)
        if name is not None:
            title = posixpath.join(path, name) if name else path
            data = _read(filesystem, posixpath.join(root, name) if name else root, title)
            file_format = source.format or format_of(title)
            if file_format is None:
                known = ", ".join(dict.fromkeys(SUFFIXES.values()))
                raise DataError(f"{title}: the name tells no format; add `format:`, one of {known}")
            tables[split] = parse_table(data, title, file_format, source.encoding, wanted)
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


def _read(filesystem: Any, location: str, title: str) -> bytes:
    try:
        with filesystem.open(location, "rb", compression="infer") as file:
            return bytes(file.read())
    except FileNotFoundError as error:
        hint = _beside(filesystem, location)
        raise DataError(f"{title}: no such file or folder{hint}") from error
    except Exception as error:  # every filesystem raises its own
        raise DataError(f"{title}: cannot be read ({error})") from error


def _beside(filesystem: Any, location: str) -> str:
    """What stands in the same folder, for the message about a file that is not there."""
    folder, name = posixpath.split(location)
    try:
        paths = sorted(str(item) for item in filesystem.ls(folder, detail=False))
    except Exception:  # only a hint
        return ""
    names = [posixpath.basename(path) for path in paths]
    return f"; in its folder: {there_is(names, name)}"
