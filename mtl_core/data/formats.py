"""File formats: the bytes of a JSONL, JSON, CSV, TSV, Parquet or CoNLL file become a table."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeAlias

from mtl_core.config import Format
from mtl_core.errors import DataError

Column: TypeAlias = str | int
Row: TypeAlias = dict[Column, Any]

MAX_CELL = 2**31 - 1
"""Characters; of Python's csv it is 131,072, less than a document may have."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zip")
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
}


class BadRow(DataError):
    """One row cannot be read although the rest of its file can: what `on_bad_row: skip` skips."""


@dataclass(frozen=True)
class Table:
    """The rows of one split before anything is known about texts and labels."""

    title: str
    """What messages call it: the file, or the Hub dataset and split."""
    columns: tuple[Column, ...]
    """Every column that some row has; for CoNLL the numbers from both ends."""
    rows: list[tuple[str, Row | BadRow]]
    """Each row, or why it is none, with its place (`file:line`)."""


def format_of(name: str) -> Format | None:
    """The format that a file's name tells, looking through .gz and the like."""
    path = PurePosixPath(name.lower())
    suffix = PurePosixPath(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return SUFFIXES.get(suffix)


def parse_table(
    data: bytes,
    title: str,
    file_format: Format,
    encoding: str,
    wanted: Sequence[Column],
    first: int = 1,
) -> Table:
    """Parse one file, or a run of lines of a JSONL file.

    Args:
        data: its bytes, decompressed.
        title: its name in messages.
        encoding: of the text formats.
        wanted: columns that matter; Parquet and CoNLL leave others out.
        first: number of the first line, of JSONL.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    if file_format == "parquet":
        table = _parse_parquet(data, title, wanted)
    elif file_format == "conll":
        table = _parse_conll(_decode(data, title, encoding), title, wanted)
    elif file_format == "jsonl":
        table = _parse_jsonl(_decode(data, title, encoding, first), title, first)
    elif file_format == "json":
        table = _parse_json(_decode(data, title, encoding), title)
    else:
        delimiter = "," if file_format == "csv" else "\t"
        table = _parse_csv(_decode(data, title, encoding), title, delimiter, wanted)
    return table


def _decode(data: bytes, title: str, encoding: str, first: int = 1) -> str:
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except LookupError as error:
        raise DataError(f"{title}: {error}; give a name such as utf-8 or latin-1") from error
    except UnicodeDecodeError as error:
        line = first + data.count(b"\n", 0, error.start)
        wrong = data[error.start]
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        name = "utf-16" if utf16 else "latin-1"
        raise DataError(
            f"{title}:{line}: byte 0x{wrong:02x} is not {encoding}; save the file as UTF-8 "
            f"or name its encoding in the source, such as `encoding: {name}`"
        ) from error


def _parse_jsonl(text: str, title: str, first: int) -> Table:
    rows: list[tuple[str, Row | BadRow]] = []
    columns: dict[Column, None] = {}
    for number, line in enumerate(text.split("\n"), start=first):
        if not line.strip():
            continue
        row: Row | BadRow
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            row = BadRow(f"no valid JSON ({error.msg} at character {error.colno})")
        else:
            row = value if isinstance(value, dict) else BadRow("expected a JSON object, {…}")
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
        rows.append((f"{title}:{number}", row))
    return Table(title, tuple(columns), rows)


def _parse_json(text: str, title: str) -> Table:
    try:
        items = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = "; for one object a line set `format: jsonl`" if error.msg == "Extra data" else ""
        raise DataError(f"{title}:{error.lineno}: no valid JSON ({error.msg}){hint}") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        hint = "for one object a line set `format: jsonl`"
        raise DataError(f"{title}: expected a list of objects, [{{…}}, …]; {hint}")
    columns = dict.fromkeys(name for item in items for name in item)
    rows = [(f"{title}, row {number}", item) for number, item in enumerate(items, start=1)]
    return Table(title, tuple(columns), rows)


def _parse_csv(text: str, title: str, delimiter: str, wanted: Sequence[Column]) -> Table:
    if not text.strip():
        return Table(title, (), [])
    longest = csv.field_size_limit(MAX_CELL)  # of the whole process
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[str, Row | BadRow]] = []
    line = 1
    try:
        header: list[Column] = [name.strip() for name in next(reader, [])]
        twice = next((name for name in header if name in wanted and header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{title}: two columns are called {twice!r}; rename one")
        line = reader.line_num + 1
        for cells in reader:
            place = f"{title}:{line}"
            line = reader.line_num + 1
            if len(cells) == len(header):
                rows.append((place, dict(zip(header, cells, strict=True))))
            elif cells:
                problem = f"{len(cells)} cells under a header of {len(header)}"
                rows.append((place, BadRow(f"{problem}; quote cells that hold {delimiter!r}")))
    except csv.Error as error:
        raise DataError(
            f"{title}:{line}: {error}; check this record's quotes (double those in a quoted cell)"
        ) from error
    finally:
        csv.field_size_limit(longest)
    return Table(title, tuple(header), rows)


def _parse_parquet(data: bytes, title: str, wanted: Sequence[Column]) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        columns = file.schema_arrow.names
        items = file.read([name for name in columns if name in wanted]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{title}: no readable Parquet file ({error})") from error
    rows = [(f"{title}, row {number}", item) for number, item in enumerate(items, start=1)]
    return Table(title, tuple(columns), rows)


def _parse_conll(text: str, title: str, wanted: Sequence[Column]) -> Table:
    rows: list[tuple[str, Row | BadRow]] = []
    width = 0
    for number, lines in _sentences(text):
        width = width or len(lines[0])
        odd = next((i for i, cells in enumerate(lines) if len(cells) != width), None)
        if odd is None:
            numbers = [c for c in wanted if isinstance(c, int) and -width <= c < width]
            rows.append((f"{title}:{number}", {c: [cells[c] for cells in lines] for c in numbers}))
        else:
            problem = BadRow(f"{len(lines[odd])} columns where the file's first token has {width}")
            rows.append((f"{title}:{number + odd}", problem))
    return Table(title, tuple(range(-width, width)), rows)


def _sentences(text: str) -> Iterator[tuple[int, list[list[str]]]]:
    """(number of its first line, cells by line) of each sentence; -DOCSTART- lines are none."""
    lines: list[list[str]] = []
    number = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            cells = line.split("\t") if "\t" in line else re.split(" +", line.strip())
            lines.append([cell.strip() for cell in cells])
        elif lines:
            yield number - len(lines), lines
            lines = []
    if lines:
        yield number - len(lines) + 1, lines
