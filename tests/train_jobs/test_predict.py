"""Prediction for sentences and for files."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtl_core.answers import flat_types
from mtl_core.errors import ArtifactError, ConfigError, DataError
from mtl_core.predictor import Predictor
from tests.commands import run
from tests.terminal import Terminal
from train_jobs import evaluate, predict, similarity

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROWS_DONE = re.compile(r"^predicting .* (\d+)/6000 rows", re.MULTILINE)


@pytest.fixture(scope="module")
def artifact(finished: Path) -> Path:
    return finished / "runs/small/artifact"


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sentences_are_answered_on_the_terminal_and_as_json(artifact: Path) -> None:
    text = "Maria waited in Berlin."
    shown = run("predict", "--artifact", str(artifact), "--text", text)
    assert shown.returncode == 0, shown.stderr
    assert text in shown.stdout
    assert "sentiment" in shown.stdout
    as_json = run("predict", "--artifact", str(artifact), "--text", text, "--json")
    expected = Predictor.load(artifact).predict([text])[0]
    assert json.loads(as_json.stdout)["sentiment"]["label"] == expected["sentiment"]["label"]
    fast = run(
        "predict", "--artifact", str(artifact), "--text", text, "--json", "--runtime", "auto"
    )
    auto = Predictor.load(artifact, runtime="auto").predict([text])[0]
    assert auto["sentiment"] != expected["sentiment"]
    assert json.loads(fast.stdout)["sentiment"] == auto["sentiment"]


def test_a_file_keeps_columns_and_order_and_equals_the_predictor(
    artifact: Path, tmp_path: Path, ray_address: str
) -> None:
    rows = [{"id": i, "text": f"{'word ' * (i % 9)}Lisbon {i}", "extra": [i]} for i in range(2500)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(
        "predict",
        "--artifact",
        str(artifact),
        "--input",
        str(source),
        "--output",
        str(target),
        address=ray_address,
    )
    assert done.returncode == 0, done.stderr
    assert "2500 row(s) written" in done.stdout
    # Ray's own core remarks on every pool of actors; Ray Data is to keep its log to itself.
    assert [line for line in done.stderr.splitlines() if "core_worker.cc" not in line] == []
    assert "ray" not in done.stdout
    table = pq.read_table(target).to_pylist()
    assert [{k: row[k] for k in ("id", "text", "extra")} for row in table] == rows
    expected = Predictor.load(artifact).predict([row["text"] for row in rows])
    assert [row["predicted_sentiment"] for row in table] == [
        e["sentiment"]["label"] for e in expected
    ]
    for row, answer in zip(table, expected, strict=True):
        got = [(e["start"], e["end"], e["entity_group"]) for e in row["predicted_entities"]]
        assert got == [(e["start"], e["end"], e["entity_group"]) for e in answer["entities"]]
    assert not list(tmp_path.glob("*.bad.jsonl"))
    with pytest.raises(ConfigError, match="exists; remove it, or add --overwrite"):
        predict.main(["--artifact", str(artifact), "--input", str(source), "--output", str(target)])


def test_bad_rows_are_named_in_a_side_file_and_the_others_answered(
    artifact: Path, tmp_path: Path, ray_address: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"text": "fine"}\n{"text": "bro\n\n{"text": "   "}\n{"text": 5}\n["no object"]\n'
        b'{"other": 1}\n{"text": "\xff\xfe"}\n{"text": "also fine \xf0\x9f\x99\x82"}\n'
    )
    done = run(
        "predict",
        "--artifact",
        str(artifact),
        "--input",
        str(source),
        "--output",
        str(target),
        address=ray_address,
    )
    assert done.returncode == 0, done.stderr
    assert "2 row(s) written" in done.stdout
    assert f"6 bad row(s) to {target}.bad.jsonl" in done.stdout
    assert [row["text"] for row in jsonl(target)] == ["fine", "also fine 🙂"]
    bad = {row["line"]: row["error"] for row in jsonl(tmp_path / "out.jsonl.bad.jsonl")}
    assert sorted(bad) == [2, 4, 5, 6, 7, 8]
    assert "broken JSON" in bad[2]
    assert "only spaces" in bad[4]
    assert "int, not text" in bad[5]


def test_bad_rows_of_an_earlier_run_go_with_the_output_that_is_replaced(
    artifact: Path, tmp_path: Path, ray_address: str
) -> None:
    store, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/out.jsonl"
    source = tmp_path / "in.jsonl"
    arguments = ["--artifact", str(artifact), "--input", str(source), "--output", url]
    for content, left in (('{"text": "a"}\n{"text": ""}\n', True), ('{"text": "b"}\n', False)):
        source.write_text(content)
        predict.main([*arguments, "--overwrite"])
        assert store.exists(url)
        assert store.exists(f"{url}.bad.jsonl") == left
    assert json.loads(store.cat_file(url))["text"] == "b"


def test_a_file_of_blank_texts_gives_a_table_without_rows(
    artifact: Path, tmp_path: Path, ray_address: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text('{"id": 1, "text": ""}\n{"id": 2, "text": "  "}\n')
    files = ("--input", str(source), "--output", str(target))
    done = run("predict", "--artifact", str(artifact), *files, address=ray_address)
    assert done.returncode == 0, done.stderr
    assert f"0 row(s) written to {target}, 2 bad row(s)" in done.stdout
    table = pq.read_table(target)
    assert len(table) == 0
    answered = flat_types({"entities": "token_classification", "sentiment": "classification"})
    types = {f"predicted_{name}": kind for name, kind in answered.items()}
    assert table.schema.equals(pa.schema({"id": pa.int64(), "text": pa.string()} | types))
    assert [row["line"] for row in jsonl(tmp_path / "out.parquet.bad.jsonl")] == [1, 2]


def test_progress_is_counted_in_rows_and_an_older_output_gives_way_when_told_to(
    artifact: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"text": "Lisbon {i}"}}\n' for i in range(6000)))
    target.write_text("of another run\n")
    files = ("--input", str(source), "--output", str(target), "--overwrite")
    with Terminal("predict", "--artifact", str(artifact), *files) as terminal:
        screen, seen = terminal.screen, [0]

        def all_rows() -> bool:
            shown = [int(number) for number in ROWS_DONE.findall(screen.text)]
            # Ray's own core remarks on a pool of actors behind the line that stands there then.
            once = 1 + screen.text.count("core_worker.cc")
            assert len(shown) <= once, f"drawn below, not over, the last one:\n{screen.text}"
            seen.extend(number for number in shown[-1:] if number != seen[-1])
            return seen[-1] == 6000

        terminal.wait_until(all_rows)
        assert terminal.wait() == 0, screen.text
    assert len(seen) >= 3
    assert seen == sorted(seen)
    assert [row["text"] for row in jsonl(target)] == [f"Lisbon {i}" for i in range(6000)]


def test_csv_and_parquet_come_out_with_their_types(
    artifact: Path, tmp_path: Path, ray_address: str
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(
        b'id,sentence\n1,"two\nlines, one cell"\n2,plain\n3,too,many\n4,latin-1 caf\xe9\n'
    )
    done = run(
        "predict",
        "--artifact",
        str(artifact),
        "--input",
        str(source),
        "--column",
        "sentence",
        "--output",
        str(target),
        "--task",
        "sentiment",
        "--runtime",
        "auto",
        address=ray_address,
    )
    assert done.returncode == 0, done.stderr
    with target.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sentence"] for row in rows] == ["two\nlines, one cell", "plain"]
    bad = jsonl(tmp_path / "out.csv.bad.jsonl")
    assert [row["line"] for row in bad] == [5, 6]
    assert bad[1]["error"] == "cell 2 is not UTF-8: byte 0xe9"
    assert set(rows[0]) == {"id", "sentence", "predicted_sentiment", "predicted_sentiment_score"}
    fast = Predictor.load(artifact, runtime="auto").predict([row["sentence"] for row in rows])
    scores = [float(row["predicted_sentiment_score"]) for row in rows]
    assert scores == [answer["sentiment"]["score"] for answer in fast]
    table = pa.table({"text": ["one", "two"], "when": pa.array([0, 1], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "in.parquet")
    done = run(
        "predict",
        "--artifact",
        str(artifact),
        "--input",
        str(tmp_path / "in.parquet"),
        "--output",
        str(tmp_path / "out.parquet"),
        address=ray_address,
    )
    assert done.returncode == 0, done.stderr
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.field("when").type == pq.read_schema(tmp_path / "in.parquet").field("when").type


def test_similarity_writes_picture_and_table(artifact: Path, tmp_path: Path) -> None:
    texts = ["The food was cold.", "The meal was cold.", "Łódź $5 🙂"]
    done = run(
        "similarity",
        "--artifact",
        str(artifact),
        "--text",
        *texts,
        "--output",
        str(tmp_path / "map.png"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "map.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    matrix = Predictor.load(artifact).similarity(texts)
    assert table[0][1:] == texts
    assert [float(v) for v in table[1][1:]] == pytest.approx(matrix[0].tolist(), abs=1e-5)


def test_more_sentences_than_a_picture_takes_give_the_table(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, picture = tmp_path / "lines.txt", tmp_path / "map.png"
    lines.write_text("".join(f"line {number}\n" for number in range(201)))
    options = ["--artifact", str(artifact), "--input", str(lines), "--output", str(picture)]
    similarity.main(options)
    assert "no picture: 201 sentences" in capsys.readouterr().out
    assert not picture.exists()
    assert len((tmp_path / "map.csv").read_text().splitlines()) == 202


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "in.jsonl"], "--input needs --output"),
        (["--text", "fine", "--output", "out.jsonl"], "--text takes none"),
        (["--input", "a.jsonl", "--output", "b.jsonl", "--workers", "-1"], "expected 1 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    artifact: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        predict.main(["--artifact", str(artifact), *options])


def test_a_damaged_artifact_is_told_before_processes_start(artifact: Path, tmp_path: Path) -> None:
    damaged, source = tmp_path / "damaged", tmp_path / "in.jsonl"
    shutil.copytree(artifact, damaged)
    weights = damaged / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    source.write_text('{"text": "fine"}\n')
    files = ["--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(ArtifactError, match=r"model\.safetensors: damaged"):
        predict.main(["--artifact", str(damaged), *files])


def test_evaluation_repeats_the_scores_of_the_manifest_and_takes_other_files(
    artifact: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    done = run("evaluate", "--artifact", str(artifact), "--split", "test", "--output", str(report))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((artifact / "manifest.json").read_text())
    for task, values in json.loads(report.read_text()).items():
        assert values["scores"] == manifest["tasks"][task]["metrics"]["test"]
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "The food was cold.", "sentiment": "negative"}\n')
    done = run("evaluate", "--artifact", str(artifact), "--data", f"sentiment={other}")
    assert done.returncode == 0, done.stderr
    assert "entities" not in done.stdout
    other.write_text('{"text": "The food was cold.", "sentiment": "angry"}\n')
    with pytest.raises(DataError, match="'angry'"):
        evaluate.main(["--artifact", str(artifact), "--data", f"sentiment={other}"])
