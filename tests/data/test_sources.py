"""Every way to name a source, and every mistake in one."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_core.config import SourceConfig, Split, TaskConfig
from mtl_core.data.encoding import resolve_labels
from mtl_core.data.examples import Corpus, Example, Span, Target
from mtl_core.data.rows import align
from mtl_core.data.sources import read_corpus, read_source
from mtl_core.data.tags import spans_to_tags
from mtl_core.errors import DataError

Columns: TypeAlias = dict[str, str | int]

MTL_DATA = os.environ.get("MTL_DATA", "")
needs_data = pytest.mark.skipif(not MTL_DATA, reason="MTL_DATA is not set")

TASKS = {
    "topic": TaskConfig(kind="classification"),
    "tones": TaskConfig(kind="multilabel"),
    "ner": TaskConfig(kind="token_classification"),
}
TOPIC: Columns = {"text": "text", "topic": "label"}
NER: Columns = {"words": "tokens", "ner": "tags"}
SPLIT_NAMES = ("train", "validation", "test")
ROWS: list[dict[str, Any]] = [
    {"text": f"text {number}", "label": "ab"[number % 2]} for number in range(20)
]


def read(path: Path | str, columns: Columns, **options: Any) -> Corpus:
    source = SourceConfig.model_validate({"path": str(path), "columns": columns, **options})
    return read_source(source, TASKS, seed=1)


def rows_of(corpus: Corpus) -> list[Example]:
    """All of a single file's rows, carved or not, in the order of their texts."""
    return sorted(corpus.splits["train"] + corpus.splits["validation"], key=lambda row: row.text)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(tmp_path: Path, row: dict[str, Any], columns: Columns) -> Example:
    """The example that a row becomes."""
    path = write_jsonl(tmp_path / "one.jsonl", [{**row, "nr": 1}, {**row, "nr": 2}])
    return read(path, columns).splits["train"][0]


@pytest.fixture
def message(tmp_path: Path) -> Callable[..., str]:
    """The message of the error that a file with this content gives."""

    def read_wrong(
        content: str | bytes, columns: Columns, name: str = "train.jsonl", **options: Any
    ) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError) as raised:
            read(path, columns, **options)
        return str(raised.value).replace(str(tmp_path) + "/", "")

    return read_wrong


class TestFormats:
    """The same rows, whatever the file."""

    def expected(self) -> list[Example]:
        return sorted(
            (Example(row["text"], {"topic": row["label"]}) for row in ROWS),
            key=lambda row: row.text,
        )

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz"])
    def test_jsonl(self, tmp_path: Path, name: str) -> None:
        text = "\n\n".join(json.dumps(row) for row in ROWS).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        assert rows_of(read(tmp_path / name, TOPIC)) == self.expected()

    def test_json(self, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
        assert rows_of(read(tmp_path / "rows.json", TOPIC)) == self.expected()

    @pytest.mark.parametrize(("name", "delimiter"), [("rows.csv", ","), ("rows.tsv.gz", "\t")])
    def test_csv_and_tsv(self, tmp_path: Path, name: str, delimiter: str) -> None:
        lines = [delimiter.join(("nr", "text", "label"))]
        lines += [delimiter.join(("1", f'"{row["text"]}"', row["label"])) for row in ROWS]
        text = ("\ufeff" + "\r\n".join(lines)).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        assert rows_of(read(tmp_path / name, TOPIC)) == self.expected()

    def test_parquet(self, tmp_path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist([{**row, "other": [1]} for row in ROWS])
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        assert rows_of(read(tmp_path / "rows.parquet", TOPIC)) == self.expected()

    def test_an_unknown_name_with_its_format_given(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "rows.txt", ROWS)
        assert rows_of(read(tmp_path / "rows.txt", TOPIC, format="jsonl")) == self.expected()

    @pytest.mark.parametrize("url", ["memory://corpus", "file://{tmp_path}"])
    def test_urls_of_files_and_folders(self, tmp_path: Path, url: str) -> None:
        folder = url.format(tmp_path=tmp_path)
        for split in ("train", "test"):
            with fsspec.open(f"{folder}/{split}.jsonl", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in ROWS)
        corpus = read(folder, TOPIC)
        assert rows_of(corpus) == self.expected()
        assert len(corpus.splits["test"]) == 20
        assert rows_of(read(f"{folder}/test.jsonl", TOPIC)) == self.expected()

    def test_a_cell_as_long_as_a_document(self, tmp_path: Path) -> None:
        text = "word " * 40_000
        (tmp_path / "a.csv").write_text(f'text,label\n"{text}",a\n"x",b\n', encoding="utf-8")
        longest = csv.field_size_limit()
        assert [len(row.text) for row in rows_of(read(tmp_path / "a.csv", TOPIC))] == [200_000, 1]
        assert csv.field_size_limit() == longest

    def test_latin_1(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes("text,label\ncafé,ä\nthé,ö".encode("latin-1"))
        corpus = read(tmp_path / "a.csv", TOPIC, encoding="latin-1")
        assert [row.text for row in rows_of(corpus)] == ["café", "thé"]

    def test_a_line_separator_inside_a_text_ends_no_row(self, tmp_path: Path) -> None:
        text = '{"text": "one\u2028two", "label": "a"}\n' * 2
        (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
        assert rows_of(read(tmp_path / "a.jsonl", TOPIC))[0].text == "one\u2028two"


class TestConll:
    def test_sentences_tabs_spaces_and_everything_odd_about_them(self, tmp_path: Path) -> None:
        text = (
            "\ufeff-DOCSTART- -X- O\n\nAnna\tNNP\tB-PER\r\nBell\tNNP\tI-PER\r\n\t\t\n"
            "-DOCSTART- -X- O\n in NN O\nthe DT O\n\xa0\tX\tO\nHague NNP B-LOC\n"
        )
        (tmp_path / "a.conll").write_bytes(text.encode())
        rows = rows_of(read(tmp_path / "a.conll", {"words": 0, "ner": -1}))
        assert rows[0] == Example("Anna Bell", {"ner": (Span(0, 9, "PER"),)}, ((0, 4), (5, 9)))
        assert rows[1].targets == {"ner": (Span(8, 13, "LOC"),)}
        assert [rows[1].text[a:b] for a, b in rows[1].words] == ["in", "the", "Hague"]

    def test_words_are_the_first_column_by_default(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x O\n\ny O\n")
        corpus = read(tmp_path / "a.txt", {"ner": 1}, format="conll")
        assert [row.text for row in rows_of(corpus)] == ["x", "y"]

    def test_a_line_of_another_width_is_a_bad_row(self, message: Callable[..., str]) -> None:
        columns = {"words": 0, "ner": -1}
        said = message("a O\n\nb O\nc\n", columns, "a.conll")
        assert said.startswith("a.conll:4: 1 columns where the file's first token has 2")

    def test_a_column_beyond_the_last(self, message: Callable[..., str]) -> None:
        said = message("a O\n", {"words": 0, "ner": 3}, "a.conll")
        assert said == "a.conll: columns.ner: no column 3; there is: -2, -1, 0, 1"

    def test_labels_of_texts_cannot_come_from_conll(self, message: Callable[..., str]) -> None:
        said = message("a O\n", {"words": 0, "tones": 1}, "a.conll")
        assert "columns.tones: a numbered column has a value a word" in said

    def test_other_schemes_are_converted(self, tmp_path: Path) -> None:
        (tmp_path / "a.conll").write_text("a B-x\nb E-x\nc S-x\n\nd O\n")
        rows = rows_of(read(tmp_path / "a.conll", {"words": 0, "ner": 1}))
        assert rows[0].targets == {"ner": (Span(0, 3, "x"), Span(4, 5, "x"))}


class TestRows:
    def test_a_text_with_labels_for_three_tasks(self, tmp_path: Path) -> None:
        row = {
            "text": "Anna  likes Rome",
            "tokens": ["Anna", "likes", "Rome"],
            "label": 3,
            "tones": ["warm", "dry", "warm"],
            "tags": ["B-PER", "O", "B-LOC"],
        }
        columns = {"text": "text", "topic": "label", "tones": "tones", **NER}
        assert one(tmp_path, row, columns) == Example(
            "Anna  likes Rome",
            {
                "topic": "3",
                "tones": ("warm", "dry"),
                "ner": (Span(0, 4, "PER"), Span(12, 16, "LOC")),
            },
            ((0, 4), (6, 11), (12, 16)),
        )

    @pytest.mark.parametrize(
        ("value", "label"), [(" a ", "a"), (0, "0"), (True, "True"), (2.0, "2")]
    )
    def test_labels_become_strings(self, tmp_path: Path, value: object, label: str) -> None:
        example = one(tmp_path, {"text": "x", "label": value}, TOPIC)
        assert example.targets == {"topic": label}

    @pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
    def test_a_missing_value_leaves_the_row_unlabelled(self, tmp_path: Path, value: object) -> None:
        row = {"text": "x", "label": value, "tones": ["a"], "tags": value}
        example = one(tmp_path, row, {"topic": "label", "tones": "tones", "text": "text"})
        assert example.targets == {"tones": ("a",)}

    def test_rows_without_any_label_are_dropped(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", ROWS)
        write_jsonl(tmp_path / "test.jsonl", [*ROWS, {"text": "unlabelled"}])
        write_jsonl(tmp_path / "dev.jsonl", [{"text": "unlabelled", "label": None}])
        corpus = read(tmp_path, TOPIC)
        assert {split: len(rows) for split, rows in corpus.splits.items()} == {
            "train": 18,
            "validation": 2,
            "test": 20,
        }

    def test_empty_lists_are_labels_too(self, tmp_path: Path) -> None:
        columns: Columns = {"text": "text", "tones": "tones", "ner": "spans"}
        example = one(tmp_path, {"text": "a b", "tones": [], "spans": []}, columns)
        assert example == Example("a b", {"tones": (), "ner": ()}, ((0, 1), (2, 3)))

    def test_entities_by_character_cut_the_words(self, tmp_path: Path) -> None:
        spans = [{"start": 12, "end": 16, "label": "LOC"}, {"start": 0, "end": 4, "label": "PER"}]
        columns: Columns = {"text": "text", "ner": "spans"}
        example = one(tmp_path, {"text": "Anna's from\tRome.", "spans": spans}, columns)
        assert example.targets == {"ner": (Span(0, 4, "PER"), Span(12, 16, "LOC"))}
        assert [example.text[a:b] for a, b in example.words] == ["Anna", "'s", "from", "Rome", "."]

    @pytest.mark.parametrize("tones", ["warm|dry", '["warm", "dry"]', " warm | dry "])
    @pytest.mark.parametrize(
        ("words", "tags"), [("Anna left", "B-PER O"), ('["Anna", "left"]', '["B-PER", "O"]')]
    )
    def test_lists_in_csv_cells(self, tmp_path: Path, tones: str, words: str, tags: str) -> None:
        cells = ['"' + cell.replace('"', '""') + '"' for cell in (words, tags, tones)]
        (tmp_path / "a.csv").write_text("tokens,tags,tones\n" + (",".join(cells) + "\n") * 2)
        example = rows_of(read(tmp_path / "a.csv", {**NER, "tones": "tones"}))[0]
        targets: dict[str, Target] = {"ner": (Span(0, 4, "PER"),), "tones": ("warm", "dry")}
        assert example == Example("Anna left", targets, ((0, 4), (5, 9)))

    def test_a_bracketed_word_is_no_json(self, tmp_path: Path) -> None:
        (tmp_path / "a.tsv").write_text("tokens\ttags\n[a b]\tO O\n[a b]\tO O\n")
        assert rows_of(read(tmp_path / "a.tsv", NER))[0].text == "[a b]"

    @given(st.lists(st.text(min_size=1)), st.lists(st.sampled_from(["", " ", "\n "]), min_size=9))
    def test_words_are_found_whatever_stands_between(
        self, words: list[str], gaps: list[str]
    ) -> None:
        text = "".join(gaps[i % len(gaps)] + word for i, word in enumerate(words))
        spans = align(text, words)
        found = ["".join(text[span[0] : span[1]].split()) if span else "" for span in spans]
        assert found == ["".join(word.split()) for word in words]


class TestSplits:
    @pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
    def test_a_folder_by_its_file_names(self, tmp_path: Path, validation: str) -> None:
        for number, split in enumerate(("train", validation, "test"), start=1):
            write_jsonl(tmp_path / f"{split}.jsonl", ROWS[:number])
        (tmp_path / "train.md").write_text("about")
        corpus = read(tmp_path, TOPIC)
        assert [len(corpus.splits[s]) for s in ("train", "validation", "test")] == [1, 2, 3]

    def test_a_folder_whose_files_are_named(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "first.data", ROWS)
        write_jsonl(tmp_path / "second.data", ROWS[:3])
        splits = {"train": "first.data", "test": "second.data"}
        corpus = read(tmp_path, TOPIC, splits=splits, format="jsonl")
        assert [len(corpus.splits[s]) for s in ("train", "validation", "test")] == [18, 2, 3]

    def test_carving_is_a_function_of_the_seed(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
        source = SourceConfig(path=str(path), columns=TOPIC, validation_fraction=0.25)
        first, again, other = (read_source(source, TASKS, seed) for seed in (1, 1, 2))
        assert first == again
        assert first != other
        assert len(first.splits["validation"]) == 5
        texts = {row.text for rows in first.splits.values() for row in rows}
        assert texts == {row["text"] for row in ROWS}
        alone = read_source(source, TASKS, 1, ["validation"])
        assert alone.splits == {"validation": first.splits["validation"]}

    def test_carving_takes_at_least_a_row(self, tmp_path: Path) -> None:
        corpus = read(write_jsonl(tmp_path / "rows.jsonl", ROWS[:2]), TOPIC)
        assert [len(corpus.splits[split]) for split in ("train", "validation")] == [1, 1]

    def test_a_label_whose_rows_were_drawn_away_stays_known(self, tmp_path: Path) -> None:
        rows = [{"text": f"text {number}", "label": str(number)} for number in range(40)]
        corpus = read(write_jsonl(tmp_path / "a.jsonl", rows), TOPIC, limit=5)
        assert len(corpus.splits["train"]) == 5
        assert set(resolve_labels(corpus, {"topic": TASKS["topic"]})["topic"]) == {
            row["label"] for row in rows
        }

    def test_limit_keeps_the_first_draw_of_train_and_all_of_validation(
        self, tmp_path: Path
    ) -> None:
        path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
        whole, some = read(path, TOPIC), read(path, TOPIC, limit=7)
        assert some.splits["validation"] == whole.splits["validation"]
        kept = [row for row in whole.splits["train"] if row in some.splits["train"]]
        assert kept == some.splits["train"]
        assert len(kept) == 7

    @pytest.mark.parametrize("demo", [True, False])
    def test_the_same_rows_are_drawn_whichever_tasks_are_learned(
        self, demo: bool, tmp_path: Path
    ) -> None:
        """Some rows carry one label, some the other, some both or none."""
        parts: list[dict[str, Any]] = [{"a": "x"}, {"b": "y"}, {"a": "y", "b": "x"}, {}]
        rows = [{"text": f"text {n}", **parts[n % 4]} for n in range(200)]
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        origin = {"demo": True} if demo else {"path": str(path)}
        names = {"topic": "sentiment", "ner": "entities"} if demo else {"topic": "a", "tones": "b"}

        def read_tasks(*tasks: str) -> Corpus:
            columns = {"text": "text"} | {task: names[task] for task in tasks}
            source = SourceConfig.model_validate({**origin, "columns": columns, "limit": 60})
            return read_corpus([source], TASKS, seed=1)

        together = read_tasks(*names)
        for task in names:
            alone = read_tasks(task)
            for split in alone.splits:
                shared = [(row.text, row.targets.get(task)) for row in together.splits[split]]
                assert [(row.text, row.targets[task]) for row in alone.splits[split]] == [
                    row for row in shared if row[1] is not None
                ]

    def test_a_draw_without_any_label_is_refused(self, tmp_path: Path) -> None:
        rows = [*ROWS[:1], *({"text": f"unlabelled {number}"} for number in range(50))]
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        source = SourceConfig(path=str(path), columns=TOPIC)
        with pytest.raises(DataError, match=r"rows.jsonl: no row drawn for .* has a label"):
            read_corpus([source], TASKS, seed=1)

    def test_test_alone_needs_no_train(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "test.jsonl", ROWS)
        source = SourceConfig(path=str(tmp_path), columns=TOPIC)
        assert len(read_source(source, TASKS, 1, ["test"]).splits["test"]) == 20

    def test_sources_are_joined(self, tmp_path: Path) -> None:
        bad = [{"text": " ", "label": "a"}]
        paths = [write_jsonl(tmp_path / f"{name}.jsonl", ROWS + bad) for name in "ab"]
        sources = [SourceConfig(path=str(path), columns=TOPIC, on_bad_row="skip") for path in paths]
        corpus = read_corpus(sources, TASKS, seed=1)
        assert {split: len(rows) for split, rows in corpus.splits.items()} == {
            "train": 36,
            "validation": 4,
            "test": 0,
        }
        assert corpus.skipped == {str(path): 1 for path in paths}


class TestMistakes:
    def test_a_column_that_is_not_there(self, message: Callable[..., str]) -> None:
        said = message('{"text": "a", "lable": "b"}', TOPIC)
        assert said == (
            "train.jsonl: columns.topic: no column 'label'; "
            "did you mean 'lable'? there is: text, lable"
        )

    def test_a_text_column_that_one_split_lacks(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", ROWS)
        (tmp_path / "test.csv").write_text("sentence,label\nx,a\n")
        with pytest.raises(DataError, match=r"test\.csv: no column 'text'; there is: sentence, l"):
            read(tmp_path, TOPIC)

    @pytest.mark.parametrize(
        ("split", "count", "becomes"),
        [("validation", 2, "a part of train takes its place"), ("test", 0, "it is not scored")],
    )
    def test_a_split_without_the_label_column_is_told(
        self, split: Split, count: int, becomes: str, tmp_path: Path
    ) -> None:
        for name in SPLIT_NAMES:
            write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
        path = write_jsonl(tmp_path / f"{split}.jsonl", [{"text": "x", "Label": "a"}])
        source = SourceConfig(path=str(tmp_path), columns=TOPIC)
        corpus = read_corpus([source], TASKS, seed=1)
        assert len(corpus.splits[split]) == count
        (note,) = corpus.notes
        assert note.startswith(f"{path}: no column 'label', so {becomes}; did you mean 'Label'?")
        write_jsonl(path, [{"text": "x", "label": None}])
        assert read_corpus([source], TASKS, seed=1).notes == ()

    def test_train_without_the_label_column(self, tmp_path: Path) -> None:
        for name in SPLIT_NAMES:
            write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
        write_jsonl(tmp_path / "train.jsonl", [{"text": "x", "Label": "a"}])
        with pytest.raises(
            DataError, match=r"train\.jsonl: no column 'label'; did you mean 'Label"
        ):
            read(tmp_path, TOPIC)

    def test_a_split_read_alone_may_lack_what_the_others_have(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", [{**row, "tones": ["x"]} for row in ROWS])
        write_jsonl(tmp_path / "test.jsonl", ROWS)
        source = SourceConfig(path=str(tmp_path), columns={**TOPIC, "tones": "tones"})
        assert len(read_corpus([source], TASKS, 1, ["test"]).splits["test"]) == 20

    def test_a_split_with_labels_of_one_of_its_tasks_is_enough(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", [{**row, "tones": []} for row in ROWS])
        write_jsonl(tmp_path / "validation.jsonl", ROWS)
        corpus = read(tmp_path, {**TOPIC, "tones": "tones"})
        assert len(corpus.splits["validation"]) == 20

    def test_tags_and_words_of_unequal_number(self, message: Callable[..., str]) -> None:
        good = '{"tokens": ["a"], "tags": ["O"]}\n'
        said = message(good + '{"tokens": ["a", "b"], "tags": ["O"]}', NER)
        assert said.startswith("train.jsonl:2: ner: 1 tags for 2 words; `on_bad_row: skip`")

    def test_a_row_without_tags_among_rows_with_some(self, message: Callable[..., str]) -> None:
        rows = [{"tokens": ["a"], "tags": tags} for tags in (["O"], [])]
        said = message("\n".join(json.dumps(row) for row in rows), NER)
        assert said.startswith("train.jsonl:2: ner: 0 tags for 1 words (lists of entities need")

    def test_tags_without_words(self, message: Callable[..., str]) -> None:
        said = message('{"text": "a", "tags": ["O"]}', {"text": "text", "ner": "tags"})
        assert said.startswith("train.jsonl:1: ner: tags without words; name their column")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.conll"])
    @pytest.mark.parametrize("content", ["", "\n \n"])
    def test_an_empty_file(self, message: Callable[..., str], name: str, content: str) -> None:
        columns: Columns = {"words": 0, "ner": 1} if "conll" in name else TOPIC
        assert message(content, columns, name) == f"{name}: the file has no rows"

    def test_a_header_without_rows(self, message: Callable[..., str]) -> None:
        assert message("text,label\n", TOPIC, "a.csv") == "a.csv: the file has no rows"

    def test_a_broken_json_line(self, message: Callable[..., str]) -> None:
        said = message('{"text": "a", "label": "b"}\n{"text": "a"\n', TOPIC)
        assert said.startswith("train.jsonl:2: no valid JSON (Expecting ',' delimiter at character")

    def test_a_json_line_that_is_no_object(self, message: Callable[..., str]) -> None:
        assert message('["a"]', TOPIC).startswith("train.jsonl:1: expected a JSON object")

    def test_json_lines_in_a_json_file(self, message: Callable[..., str]) -> None:
        said = message('{"text": "a"}\n{"text": "b"}', TOPIC, "a.json")
        assert said.startswith(
            "a.json:2: no valid JSON (Extra data); for one object a line set `fo"
        )

    def test_json_that_is_no_list_of_objects(self, message: Callable[..., str]) -> None:
        said = message('{"text": "a"}', TOPIC, "a.json")
        assert said.startswith("a.json: expected a list of objects")

    def test_half_a_character(self, message: Callable[..., str]) -> None:
        said = message('{"text": "hi \\ud83d there", "label": "a"}', TOPIC)
        assert said.startswith("train.jsonl:1: the text is no valid Unicode")

    @pytest.mark.parametrize("text", ["", " \t", None])
    def test_a_blank_text(self, message: Callable[..., str], text: str | None) -> None:
        said = message(json.dumps({"text": text, "label": "a"}), TOPIC)
        assert said.startswith("train.jsonl:1: the text is empty or only spaces")

    @pytest.mark.parametrize(
        ("content", "place", "fix"),
        [
            ("text,label\ncafé,a\n".encode("latin-1"), "a.csv:2: byte 0xe9", "latin-1"),
            ("text,label\nx,a\n".encode("utf-16"), "a.csv:1: byte 0xff", "utf-16"),
        ],
    )
    def test_a_file_in_another_encoding(
        self, message: Callable[..., str], content: bytes, place: str, fix: str
    ) -> None:
        said = message(content, TOPIC, "a.csv")
        assert said.startswith(f"{place} is not utf-8")
        assert said.endswith(f"`encoding: {fix}`")

    def test_an_encoding_that_does_not_exist(self, message: Callable[..., str]) -> None:
        assert "unknown encoding: utf-9" in message("text\nx\n", TOPIC, "a.csv", encoding="utf-9")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", ROWS)
        with pytest.raises(DataError, match=r"trian\.jsonl: no such .* did you mean 'train\."):
            read(tmp_path / "trian.jsonl", TOPIC)

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nowhere: no such file or folder"):
            read(tmp_path / "nowhere", TOPIC, format="jsonl")
        with pytest.raises(DataError, match="nowhere: no such file or folder"):
            read(tmp_path / "nowhere", TOPIC)

    def test_a_missing_split_file(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", ROWS)
        with pytest.raises(DataError, match=r"tset\.jsonl: no such .* there is: train\.jsonl"):
            read(tmp_path, TOPIC, splits={"test": "tset.jsonl"})

    def test_a_folder_without_train(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "training.jsonl", ROWS)
        with pytest.raises(DataError, match=r"no train split; name its file: .* training\.jsonl"):
            read(tmp_path, TOPIC)

    def test_two_files_for_a_split(self, tmp_path: Path) -> None:
        for name in ("dev.jsonl", "train.jsonl", "valid.jsonl"):
            write_jsonl(tmp_path / name, ROWS)
        with pytest.raises(DataError, match=r"dev\.jsonl and valid\.jsonl could both be val"):
            read(tmp_path, TOPIC)

    def test_splits_of_a_single_file(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ROWS)
        with pytest.raises(DataError, match="`splits` names files of a folder"):
            read(path, TOPIC, splits={"test": "a.jsonl"})

    def test_a_name_that_tells_no_format(self, message: Callable[..., str]) -> None:
        assert message("x", TOPIC, "a.txt").startswith("a.txt: the name tells no format; add `form")

    def test_a_protocol_that_nobody_knows(self) -> None:
        with pytest.raises(DataError, match=r"zz://a\.csv: cannot be opened \(Protocol not known"):
            read("zz://a.csv", TOPIC)

    @pytest.mark.parametrize("name", ["a.parquet", "a.csv.gz"])
    def test_a_file_that_is_not_what_it_says(self, message: Callable[..., str], name: str) -> None:
        assert message("text,label\n", TOPIC, name).startswith(f"{name}: ")

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ({"text": 5, "label": "a"}, "text: expected a string, got int 5"),
            ({"text": "x", "label": ["a"]}, "topic: expected a label, .* got list .*multilabel"),
            ({"text": "x", "label": 0.5}, "topic: expected a label, .* got float 0.5"),
            ({"text": "x", "tones": {"a": 1}}, "tones: expected a label, .* got dict"),
            ({"text": "x", "tones": [0, 1, 1]}, "tones: .* looks like a multi-hot vector"),
            ({"text": "x", "tones": "['a', 'b']"}, "tones: .* is no JSON list"),
            ({"text": "x", "tokens": ["x"], "tags": [3]}, "ner: expected tags by name, .* int 3"),
            ({"text": "x", "tokens": ["x"], "tags": [None]}, "ner: expected tags by name"),
            ({"text": "x", "tokens": ["x"], "tags": 7}, "ner: expected a list, got int 7"),
            ({"text": "x", "tokens": ["x"], "tags": ["PER"]}, "ner: tag 'PER' belongs to no sch"),
            ({"text": "x", "tokens": [1]}, "words: expected strings, got int 1"),
            ({"tokens": ["a", None], "tags": ["O", "O"]}, "words: expected strings, got NoneType"),
            ({"tokens": ["a", "b"], "tags": ["O", None]}, "ner: expected tags by name"),
            ({"text": "x", "tags": [{"start": 0}]}, "ner: expected {start, end, label}"),
            ({"text": "x", "tags": [{"start": "0", "end": 1, "label": "a"}]}, "ner: .* whole numb"),
        ],
    )
    @pytest.mark.parametrize("on_bad_row", ["error", "skip"])
    def test_a_value_of_the_wrong_type_is_never_skipped(
        self, message: Callable[..., str], row: dict[str, Any], problem: str, on_bad_row: str
    ) -> None:
        everything = {"text": "", "label": None, "tones": None, "tokens": None, "tags": None}
        columns = {"text": "text", "topic": "label", "tones": "tones", **NER}
        said = message(json.dumps(everything | row), columns, on_bad_row=on_bad_row)
        assert said.startswith("train.jsonl:1: ")
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError(said)

    @pytest.mark.parametrize(
        ("spans", "problem"),
        [
            ([(0, 9)], "marks nothing in a text of 5 characters"),
            ([(3, 3)], "marks nothing"),
            ([(-1, 3)], "marks nothing"),
            ([(2, 3)], "marks nothing"),
            ([(0, 4), (3, 5)], "entities overlap: (0, 4, 'a') and (3, 5, 'a')"),
        ],
    )
    def test_entities_off_the_text(
        self, message: Callable[..., str], spans: list[tuple[int, int]], problem: str
    ) -> None:
        entities = [{"start": start, "end": end, "label": "a"} for start, end in spans]
        row = json.dumps({"text": "ab cd", "spans": entities})
        assert problem in message(row, {"text": "text", "ner": "spans"})

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("a c", "word 2 is 'b' where the text has 'c'"),
            ("a", "word 2 is 'b' where the text has ''"),
            ("a b c", "no words for the text from character 4 on"),
        ],
    )
    def test_words_that_do_not_make_the_text(
        self, message: Callable[..., str], text: str, problem: str
    ) -> None:
        row = json.dumps({"text": text, "tokens": ["a", "b"], "tags": ["O", "O"]})
        assert message(row, {"text": "text", **NER}).startswith(f"train.jsonl:1: {problem}")

    def test_a_word_of_spaces_that_starts_an_entity(self, message: Callable[..., str]) -> None:
        row = json.dumps({"tokens": ["a", " "], "tags": ["O", "B-x"]})
        assert "ner: a word of only spaces is tagged B-x" in message(row, NER)

    def test_two_schemes_in_a_column(self, message: Callable[..., str]) -> None:
        rows = [{"tokens": ["a"], "tags": [tag]} for tag in ("S-x", "U-x")]
        said = message("\n".join(json.dumps(row) for row in rows), NER)
        assert said.startswith("train.jsonl:2: ner: the column's tags mix BIOES")

    def test_a_csv_column_that_stands_there_twice(self, message: Callable[..., str]) -> None:
        said = message("text,label,label\nx,a,b\n", TOPIC, "a.csv")
        assert said == "a.csv: two columns are called 'label'; rename one"

    def test_a_csv_row_of_another_width(self, message: Callable[..., str]) -> None:
        said = message('text,label\n"a\nb",x\nc, d,x\n', TOPIC, "a.csv")
        assert said.startswith("a.csv:4: 3 cells under a header of 2; quote cells that hold ','")

    def test_a_quote_that_never_closes(self, message: Callable[..., str]) -> None:
        said = message('text,label\na,x\n"b,x\nc,x\n', TOPIC, "a.csv")
        assert said.startswith("a.csv:3: unexpected end of data; check this record's quotes")

    def test_train_without_a_label(self, message: Callable[..., str]) -> None:
        said = message('{"text": "a", "label": null}', TOPIC)
        assert said == "train.jsonl: the train split has no readable row with a label"

    def test_a_single_training_row(self, message: Callable[..., str]) -> None:
        said = message('{"text": "a", "label": "b"}', TOPIC)
        assert said == "train.jsonl: a single training row; add a validation split"

    def test_bad_rows_are_skipped_and_counted_on_request(self, tmp_path: Path) -> None:
        good = [{"text": f"a {n}", "tokens": ["a", str(n)], "tags": ["O", "B-x"]} for n in range(9)]
        bad: list[dict[str, Any]] = [
            {"text": " ", "tokens": None, "tags": None},
            {"text": "a b", "tokens": ["a", "b"], "tags": ["O"]},
            {"text": "a c", "tokens": ["a", "b"], "tags": ["O", "O"]},
        ]
        path = write_jsonl(tmp_path / "a.jsonl", good + bad)
        with path.open("a") as file:
            file.write('{"text": \n[]\n')
        corpus = read(path, {"text": "text", **NER}, on_bad_row="skip")
        assert len(rows_of(corpus)) == 9
        assert corpus.skipped == {str(path): 5}

    def test_only_bad_rows(self, message: Callable[..., str]) -> None:
        said = message("{\n{\n", TOPIC, on_bad_row="skip")
        assert said == "train.jsonl: the train split has no readable row with a label"


class TestDemo:
    @pytest.fixture(autouse=True)
    def corpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def demo_corpus(seed: int) -> dict[str, list[Example]]:
            targets: dict[str, Target] = {"sentiment": str(seed), "entities": (Span(0, 1, "x"),)}
            return {split: [Example("x", dict(targets), ((0, 1),))] for split in SPLIT_NAMES}

        module = ModuleType("mtl_core.data.demo")
        module.__dict__["demo_corpus"] = demo_corpus
        monkeypatch.setitem(sys.modules, "mtl_core.data.demo", module)

    def test_targets_take_the_tasks_names(self) -> None:
        columns = {"text": "text", "topic": "sentiment", "ner": "entities"}
        source = SourceConfig.model_validate({"demo": True, "columns": columns})
        corpus = read_source(source, TASKS, seed=7)
        targets: dict[str, Target] = {"topic": "7", "ner": (Span(0, 1, "x"),)}
        expected = [Example("x", targets, ((0, 1),))]
        assert corpus.splits == dict.fromkeys(SPLIT_NAMES, expected)

    def test_one_of_its_tasks_is_enough(self) -> None:
        source = SourceConfig(demo=True, columns={"text": "text", "topic": "sentiment"})
        assert read_source(source, TASKS, 7, ["test"]).splits["test"][0].targets == {"topic": "7"}

    def test_it_has_two_columns(self) -> None:
        source = SourceConfig(demo=True, columns={"text": "text", "topic": "sentimnet"})
        with pytest.raises(DataError, match="no column 'sentimnet'; did you mean 'sentiment'"):
            read_source(source, TASKS, 7)

    @pytest.mark.parametrize(
        ("task", "column", "kind"),
        [
            ("tones", "sentiment", "classification"),
            ("ner", "sentiment", "classification"),
            ("topic", "entities", "token_classification"),
        ],
    )
    def test_its_columns_are_each_for_one_kind_of_task(
        self, task: str, column: str, kind: str
    ) -> None:
        source = SourceConfig(demo=True, columns={"text": "text", task: column})
        with pytest.raises(
            DataError, match=rf"demo: .*'{column}' is for `tasks.{task}.kind: {kind}`"
        ):
            read_source(source, TASKS, 7)


@needs_data
class TestRealData:
    WNUT = ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated")

    def test_wnut17_is_the_same_as_conll_and_as_jsonl(self) -> None:
        splits = dict(zip(SPLIT_NAMES, self.WNUT, strict=True))
        folder = "${MTL_DATA}/wnut17"
        conll = read(f"{folder}/conll", {"ner": -1}, format="conll", splits=splits)
        assert conll == read(folder, NER)
        assert [len(conll.splits[split]) for split in SPLIT_NAMES] == [3394, 1009, 1287]
        for split in SPLIT_NAMES:
            lines = (Path(MTL_DATA) / "wnut17" / f"{split}.jsonl").read_text("utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
            for example, row in zip(conll.splits[split], rows, strict=True):
                assert [example.text[a:b] for a, b in example.words] == row["tokens"]
                spans = example.targets["ner"]
                assert spans_to_tags(example.words, spans) == row["tags"]  # type: ignore[arg-type]

    def test_snips_words_stand_in_their_text(self) -> None:
        columns = {"text": "text", "topic": "label", **NER}
        corpus = read("${MTL_DATA}/snips", columns)
        assert [len(corpus.splits[split]) for split in SPLIT_NAMES] == [13084, 700, 700]
        examples = [example for rows in corpus.splits.values() for example in rows]
        assert len({example.targets["topic"] for example in examples}) == 7
        types = {span[2] for e in examples for span in e.targets["ner"] if isinstance(span, Span)}
        assert len(types) == 39

    def test_banking77_gets_a_validation_split(self) -> None:
        corpus = read("${MTL_DATA}/banking77", TOPIC)
        assert [len(corpus.splits[split]) for split in SPLIT_NAMES] == [9003, 1000, 3080]
