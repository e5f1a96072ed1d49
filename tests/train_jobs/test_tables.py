"""Prediction files: what can be read is read, what cannot is named, and types are kept."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtl_core.errors import ConfigError
from train_jobs.tables import TableWriter, column_types, read_rows


def test_a_csv_row_with_bytes_that_are_no_utf8_is_named_and_the_others_are_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(
        b"id,text\n1,caf\xc3\xa9 \xf0\x9f\x99\x82\n2,caf\xe9\n\xff,fine\n"
        b'3,"two\nlines \xfe"\n4,last\n'
    )
    rows = list(read_rows(path))
    assert [(row.number, row.values) for row in rows if row.error is None] == [
        (2, {"id": "1", "text": "café 🙂"}),
        (7, {"id": "4", "text": "last"}),
    ]
    assert [(row.number, row.error) for row in rows if row.error] == [
        (3, "cell 2 is not UTF-8: byte 0xe9"),
        (4, "cell 1 is not UTF-8: byte 0xff"),
        (6, "cell 2 is not UTF-8: byte 0xfe"),
    ]
    assert rows[1].values == {"cells": ["2", "caf�"]}


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_csv_whose_header_is_no_utf8_is_refused_with_the_place(
    tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "in.csv"
    path.write_text("texté,id\nfine,1\n", encoding=encoding)
    with pytest.raises(ConfigError, match=r"in\.csv:1: cell 1 is not UTF-8.*save the file as"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ('"Great film he said', "unexpected end of data"),
        ('"Great" film', "',' expected after '\"'"),
    ],
)
def test_a_csv_quote_that_is_never_closed_or_not_doubled_is_refused_with_the_place(
    cell: str, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "in.csv"
    path.write_text(f"id,text\n1,fine\n2,{cell}\n3,awful\n4,good\n")
    rows = read_rows(path)
    assert next(rows).values == {"id": "1", "text": "fine"}
    with pytest.raises(ConfigError, match=rf"in\.csv:3: {problem}; check this record's quotes"):
        list(rows)


def test_a_csv_cell_may_be_as_long_as_a_document(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("id,text\n1," + "word " * 40_000 + "\n2,last\n")
    longest = csv.field_size_limit()
    assert [len(row.values["text"]) for row in read_rows(path)] == [200_000, 4]
    assert csv.field_size_limit() == longest


def test_two_csv_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("id,text,note,note\n1,hello,a,b\n")
    with pytest.raises(ConfigError, match="two columns are called 'note'; rename one"):
        list(read_rows(path))


def test_dates_within_lists_are_written_to_a_csv(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "out.csv") as output:
        output.write({"id": 1, "seen": [date(2026, 11, 23)]})
    (row,) = read_rows(tmp_path / "out.csv")
    assert row.values == {"id": "1", "seen": '["2026-11-23"]'}


def test_a_jsonl_row_with_half_a_character_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n{"text": "fine", "id": "\xed\xa0\xbd"}\n'
    )
    rows = list(read_rows(path))
    assert [(row.number, row.values) for row in rows if row.error is None] == [(2, {"text": "🙂"})]
    assert [row.number for row in rows if row.error and "half a character" in row.error] == [1, 3]


def test_a_parquet_string_that_is_no_utf8_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    broken = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), path)
    with pytest.raises(ConfigError, match=r"in\.parquet, row 1 to 2: a string is not UTF-8"):
        list(read_rows(path))


def written(path: Path, rows: Iterable[dict[str, Any]], types: Mapping[str, Any]) -> Any:
    """What a Parquet file holds after these rows were written to it."""
    with TableWriter(path, types) as table:
        for row in rows:
            table.write(row)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return pq.read_table(path)


def copied(folder: Path, rows: Sequence[dict[str, Any]]) -> Any:
    """What a Parquet file holds of the rows of a JSONL file."""
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    types = column_types(source)
    source.unlink()
    return written(folder / "out.parquet", rows, types)


ENTITY = {"entity_group": "place", "score": 0.5, "start": 0, "end": 3}


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (None, "text"),
        (None, [1, 2]),
        (1, 2.5),
        ([], [ENTITY]),
        ([ENTITY], []),
        ([{"a": 1}], [{"a": 0.5, "b": "new"}]),
    ],
)
def test_parquet_holds_what_comes_after_the_first_thousand_rows(
    tmp_path: Path, first: Any, later: Any
) -> None:
    values = [first] * 1500 + [later] * 1500 + [first]
    table = copied(tmp_path, [{"id": i, "x": v} for i, v in enumerate(values)])
    assert table["id"].to_pylist() == list(range(3001))
    # What pyarrow infers from all values at once.
    assert table["x"].combine_chunks() == pa.array(values)


def test_a_column_may_begin_in_any_row(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 2, "b": "x"}, *[{"a": 3}] * 2000, {"a": 4, "c": True}]
    table = copied(tmp_path, rows)
    assert table.to_pylist() == [{"a": None, "b": None, "c": None} | row for row in rows]


def test_values_that_no_type_holds_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    rows = [{"x": 1}] * 1024
    for wrong in ("one", {}, 2**70):
        with pytest.raises(ConfigError, match=r"--output: Parquet cannot hold .*write \.jsonl"):
            written(tmp_path / "out.parquet", [*rows, {"x": wrong}], {"x": pa.int64()})
        assert not list(tmp_path.iterdir())


def test_parquet_without_a_row_has_the_columns_that_are_known(tmp_path: Path) -> None:
    assert written(tmp_path / "none.parquet", [], {}).shape == (0, 0)
    (tmp_path / "none.parquet").unlink()
    table = written(tmp_path / "out.parquet", [], {"id": pa.int32(), "text": pa.string()})
    assert table.schema.equals(pa.schema({"id": pa.int32(), "text": pa.string()}))
    assert len(table) == 0


def test_column_types_are_those_of_every_row(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": None}] * 2000 + [{"a": 0.5, "b": []}, {"c": "late"}]
    source = tmp_path / "in.jsonl"
    source.write_text("no JSON\n" + "".join(json.dumps(row) + "\n" for row in rows))
    expected = {"a": pa.float64(), "b": pa.list_(pa.null()), "c": pa.string()}
    assert column_types(source) == expected
    source.write_text('{"a": 1}\n' * 2000 + '{"a": "one"}\n')
    with pytest.raises(ConfigError, match=r"Parquet cannot hold .*write \.jsonl"):
        column_types(source)
    (tmp_path / "in.csv").write_text("id,text\n1,one\n")
    assert column_types(tmp_path / "in.csv") == {"id": pa.string(), "text": pa.string()}
    table = pa.table({"id": pa.array([1], pa.int8()), "when": pa.array([0], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "in.parquet")
    assert column_types(tmp_path / "in.parquet") == {"id": pa.int8(), "when": pa.timestamp("ms")}
