"""Rows of prediction files: what can be read is read, what cannot is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_core.config import ConfigError
from train_jobs.tables import read_rows


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


def test_a_csv_quote_that_is_never_closed_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('text\nfine\n"open\n' + "more words\n" * 20_000)
    with pytest.raises(ConfigError, match=r"in\.csv:\d+: field larger.*quotes"):
        list(read_rows(path))


def test_a_jsonl_row_with_half_a_character_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n{"text": "fine", "id": "\xed\xa0\xbd"}\n'
    )
    rows = list(read_rows(path))
    assert [(row.number, row.values) for row in rows if row.error is None] == [(2, {"text": "🙂"})]
    assert [row.number for row in rows if row.error and "half a character" in row.error] == [1, 3]
