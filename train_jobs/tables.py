"""Rows in and out for batch prediction: JSONL, CSV and Parquet, read and written as streams."""

from __future__ import annotations

import csv
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from mtl_core.data.formats import MAX_CELL
from mtl_core.errors import ConfigError

SUFFIXES = (".jsonl", ".csv", ".parquet")
ROWS_AT_ONCE = 1024
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
"""What Python's `surrogateescape` makes of a byte that it cannot decode."""


class Row(NamedTuple):
    """A row of the input, or what is wrong with it."""

    number: int
    """Line of the file, counted from 1; for Parquet the row."""
    values: dict[str, Any]
    error: str | None


def check_suffix(option: str, path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{option}: {path} should end in one of {', '.join(SUFFIXES)}")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order; a row that cannot be read comes with its error."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".csv":
        yield from _read_csv(path)
    else:
        yield from _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                if b"\\u" in line or not line.isascii():
                    json.dumps(values, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                yield Row(number, _as_shown(line), "no valid Unicode: it holds half a character")
            except ValueError as error:
                yield Row(number, _as_shown(line), f"broken JSON: {error}")
            else:
                if isinstance(values, dict):
                    yield Row(number, values, None)
                else:
                    yield Row(number, {"line": values}, "not a JSON object")


def _as_shown(line: bytes) -> dict[str, Any]:
    return {"line": line.decode("utf-8", "replace").rstrip("\n")[:500]}


def _read_csv(path: Path) -> Iterator[Row]:
    longest = csv.field_size_limit(MAX_CELL)  # of the whole process
    line = 1
    # Bytes that are not UTF-8 pass through as lone surrogates, so that their row can be named.
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            _check_header(path, header)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield _csv_row(reader.line_num, header, cells)
                line = reader.line_num + 1
        except csv.Error as error:
            raise ConfigError(
                f"--input: {path}:{line}: {error}; check this record's quotes "
                "(double those in a quoted cell)"
            ) from error
        finally:
            csv.field_size_limit(longest)


def _check_header(path: Path, header: list[str]) -> None:
    problem = _not_utf8(header)
    if problem:
        raise ConfigError(f"--input: {path}:1: {problem}; save the file as UTF-8")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--input: {path}: two columns are called {twice!r}; rename one")


def _csv_row(number: int, header: list[str], cells: list[str]) -> Row:
    problem = _not_utf8(cells)
    if not problem and len(cells) != len(header):
        problem = f"{len(cells)} cells where the header has {len(header)}"
    if not problem:
        return Row(number, dict(zip(header, cells, strict=True)), None)
    shown = [cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for cell in cells]
    return Row(number, {"cells": shown}, problem)


def _not_utf8(cells: list[str]) -> str | None:
    """The first byte that is no UTF-8, and its cell, or None."""
    for number, cell in enumerate(cells, start=1):
        found = None if cell.isascii() else ESCAPED_BYTE.search(cell)
        if found:
            return f"cell {number} is not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x}"
    return None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"--input: {path} is no Parquet file: {error}") from error
    number = 0
    for batch in file.iter_batches(ROWS_AT_ONCE):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:
            places = f"{path}, row {number + 1} to {number + len(batch)}"
            raise ConfigError(f"--input: {places}: a string is not UTF-8: {error}") from error
        for values in rows:
            number += 1
            yield Row(number, values, None)


def count_rows(path: Path) -> int | None:
    """How many rows there are, for a progress bar; None when only reading them all would tell."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.ParquetFile(path).metadata.num_rows)
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    return None


def column_types(path: Path) -> dict[str, Any]:
    """Name → Arrow type that holds a column's values in every row of a file.

    Raises:
        ConfigError: there is no such type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        schema = pq.read_schema(path)
    else:
        schema = pa.schema([])
        rows = (row.values for row in read_rows(path) if row.error is None)
        with _refused_by_parquet():
            while chunk := list(islice(rows, ROWS_AT_ONCE)):
                names = dict.fromkeys(name for row in chunk for name in row)
                found = pa.table({n: pa.array([row.get(n) for row in chunk]) for n in names})
                schema = pa.unify_schemas([schema, found.schema], promote_options="permissive")
    return dict(zip(schema.names, schema.types, strict=True))


@contextmanager
def _refused_by_parquet() -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OverflowError) as error:
        raise ConfigError(
            f"--output: Parquet cannot hold these columns ({error}); write .jsonl"
        ) from error


class TableWriter:
    """Writes rows to a file that appears, whole, when the block ends without an error.

    Args:
        path: the file.
        types: the Arrow types of a Parquet file's columns.
    """

    def __init__(self, path: Path, types: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.types = types or {}
        self.partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        self.pending: list[dict[str, Any]] = []
        self.file: Any = None
        self.writer: Any = None

    def __enter__(self) -> Self:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        if self.path.suffix != ".parquet":
            self.file = self.partial.open("w", encoding="utf-8", newline="")
        return self

    def write(self, row: dict[str, Any]) -> None:
        if self.path.suffix == ".jsonl":
            self.file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        elif self.path.suffix == ".csv":
            if self.writer is None:
                self.writer = csv.DictWriter(self.file, list(row), restval="")
                self.writer.writeheader()
            self._write_csv(row)
        else:
            self.pending.append(row)
            if len(self.pending) == ROWS_AT_ONCE:
                self._flush()

    def _write_csv(self, row: dict[str, Any]) -> None:
        extra = [name for name in row if name not in self.writer.fieldnames]
        if extra:
            raise ConfigError(
                f"--output: column {extra[0]!r} is not in the first row and a CSV cannot gain it; "
                "write .jsonl"
            )
        flat = {
            name: json.dumps(value, ensure_ascii=False, default=str)
            if isinstance(value, list | dict)
            else value
            for name, value in row.items()
        }
        self.writer.writerow(flat)

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _refused_by_parquet():
            table = pa.Table.from_pylist(self.pending, pa.schema(self.types))
            if self.writer is None:
                self.writer = pq.ParquetWriter(self.partial, table.schema)
            self.writer.write_table(table)
        self.pending = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self.path.suffix == ".parquet":
                self._flush()
            if self.path.suffix == ".parquet" and self.writer is not None:
                self.writer.close()
            if self.file is not None:
                self.file.close()
            if kind is None and self.partial.exists():
                self.partial.rename(self.path)
        finally:
            self.partial.unlink(missing_ok=True)
