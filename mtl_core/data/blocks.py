"""Where a large source's training rows are: runs of rows, each of which can be read on its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl_core.config import SourceConfig, TaskConfig
from mtl_core.data.files import File, find_files, read_file
from mtl_core.data.formats import COMPRESSIONS, Table, parse_table
from mtl_core.data.sources import source_columns
from mtl_core.errors import DataError

CHUNK = 1 << 24
NEWLINE = 10


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of one source's train split."""

    rows: NDArray[np.int64]
    """How many rows, or lines, each holds."""
    starts: NDArray[np.int64]
    """Where each begins, and where the last one ends: bytes of a JSONL file, else rows."""
    version: str
    """Changes with the rows: a hash of the file, or what `datasets` goes by."""


class BlockReader:
    """Finds and reads the blocks of one source: a JSONL or Parquet file, or a Hub dataset."""

    def __init__(self, source: SourceConfig) -> None:
        self.source = source
        self.wanted = list(source_columns(source).values())
        self._read: tuple[int, Any] | None = None

    @cached_property
    def _file(self) -> File:
        return find_files(self.source, ["train"], "train")["train"]

    @cached_property
    def _dataset(self) -> tuple[Any, str]:
        from mtl_core.data.hub import open_hub

        return open_hub(self.source, ["train"])["train"]

    @cached_property
    def _parquet(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        file = self._file
        try:
            return pyarrow.parquet.ParquetFile(file.filesystem.open(file.location, "rb"))
        except pyarrow.ArrowException as error:
            raise DataError(f"{file.title}: no readable Parquet file ({error})") from error

    @cached_property
    def _groups(self) -> NDArray[np.int64]:
        """Where each row group of a Parquet file begins, and where the last one ends."""
        metadata = self._parquet.metadata
        rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        return np.append(0, np.cumsum(rows, dtype=np.int64))

    def _row_group(self, number: int, columns: list[str]) -> Any:
        """A row group of a Parquet file; the last one read is kept, for the next of its blocks."""
        if self._read is None or self._read[0] != number:
            self._read = None  # its memory first
            self._read = number, self._parquet.read_row_group(number, columns)
        return self._read[1]

    def find(self, size: int) -> Blocks:
        """The source's blocks of about `size` rows, without reading more than it takes to count.

        Raises:
            DataError: the source has no train split, or one that cannot be read by parts.
        """
        if self.source.hub is not None:
            data, _ = self._dataset
            starts = np.append(np.arange(0, len(data), size), len(data))
            return Blocks(np.diff(starts), starts, str(data._fingerprint))
        if self.source.demo:
            raise DataError(f"{self.source.title}: {CANNOT}")
        file = self._file
        kind = file.known_format()
        wide = self.source.encoding.lower().startswith(("utf-16", "utf-32"))  # a newline is no byte
        if kind not in ("jsonl", "parquet") or file.location.endswith(COMPRESSIONS) or wide:
            raise DataError(f"{file.title}: {CANNOT}")
        read_file(file, 0, 1)  # says what is wrong with it
        if kind == "jsonl":
            return _by_lines(file, size)
        return Blocks(np.diff(self._groups), self._groups, _hash(file))

    def finer(self, blocks: Blocks, size: int) -> Blocks:
        """The same rows in blocks of no more than about `size`.

        Of a Parquet file's block the whole row group is read.
        """
        if self.source.hub is None and self._file.known_format() == "jsonl":
            return self.find(size)
        bounds = zip(blocks.starts[:-1], blocks.starts[1:], strict=True)
        starts = [np.arange(first, end, size) for first, end in bounds]
        found = np.concatenate([*starts, blocks.starts[-1:]])
        return Blocks(np.diff(found), found, blocks.version)

    def labels(self, tasks: Mapping[str, TaskConfig]) -> dict[str, tuple[str, ...]]:
        """Each task's labels where the dataset declares them."""
        if self.source.hub is None:
            return {}
        from mtl_core.data.hub import declared_labels

        return declared_labels(self.source, tasks, [self._dataset[0]])

    def read(self, blocks: Blocks, index: int) -> Table:
        """The rows of one block.

        Raises:
            DataError: they cannot be read.
        """
        start, end = blocks.starts[index : index + 2].tolist()
        if self.source.hub is not None:
            from mtl_core.data.hub import to_table

            data, title = self._dataset
            return to_table(data.select(range(start, end)), title, self.wanted, start + 1)
        file = self._file
        if file.known_format() == "parquet":
            import pyarrow

            columns = self._parquet.schema_arrow.names
            number = int(np.searchsorted(self._groups[1:], end))
            try:
                group = self._row_group(number, [c for c in columns if c in self.wanted])
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{file.title}: no readable Parquet file ({error})") from error
            part = group.slice(start - int(self._groups[number]), end - start)
            rows = [
                (f"{file.title}, row {place}", row)
                for place, row in enumerate(part.to_pylist(), start + 1)
            ]
            return Table(file.title, tuple(columns), rows)
        first = index * int(blocks.rows[0]) + 1
        data = read_file(file, start, end)
        return parse_table(data, file.title, "jsonl", self.source.encoding, self.wanted, first)


CANNOT = (
    "training.shard_texts reads JSONL and Parquet files, uncompressed, and Hub datasets; "
    "convert this one, or leave training.shard_texts out"
)


def _hash(file: File) -> str:
    with file.filesystem.open(file.location, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _by_lines(file: File, size: int) -> Blocks:
    """Every `size` lines of a file, found by their ends alone."""
    digest = hashlib.sha256()
    starts, lines, place, last = [np.zeros(1, np.int64)], 0, 0, b"\n"
    with file.filesystem.open(file.location, "rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == NEWLINE) + 1
            starts.append(place + ends[size - 1 - lines % size :: size])
            lines += len(ends)
            place += len(chunk)
            last = chunk[-1:]
    lines += last != b"\n"
    found = np.concatenate(starts)
    if found[-1] < place:
        found = np.append(found, place)
    rows = np.full(len(found) - 1, size)
    rows[lines // size :] = lines % size
    return Blocks(rows, found, digest.hexdigest())
