"""What each mistake gets: a message that names place and fix, exit code 1, no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mtl_core.build import build_model
from mtl_core.command import run_command
from mtl_core.config import parse_experiment
from mtl_core.data.prepare import prepare
from tests import small_runs
from tests.commands import write_config
from train_jobs import evaluate, predict, similarity, train, tune
from train_jobs.console import describe_data


def attempt(capsys: pytest.CaptureFixture[str], main: Any, *arguments: str) -> str:
    """Run a command in this process, demand that it fails cleanly, and return its message."""
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main(list(arguments)))
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train.main, ("--config", "--set", "--resume", "examples")),
        (predict.main, ("--text", "--input", "--output", "examples")),
        (evaluate.main, ("--split", "--data", "example")),
        (similarity.main, ("--text", "--output", "example")),
    ],
)
def test_help_names_every_option_and_an_example(
    capsys: pytest.CaptureFixture[str], main: Any, words: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.epoch=5", ["training.epoch: unknown key", "epochs"]),
        ("training.epochs=0", ["training.epochs", "greater than 0", "0"]),
        ("optim.learning_rate=-1", ["optim.learning_rate", "-1"]),
        ("freeze.heads=[sentimnt]", ["freeze.heads", "did you mean 'sentiment'"]),
        ("training.metric=intent/f1", ["training.metric", "unknown task 'intent'"]),
        ("tasks.topic.kind=classification", ["tasks.topic has no labels"]),
        ("scale.workers=[4, 1]", ["scale.workers", "min <= max"]),
        ("data.0.path=x.jsonl", ["exactly one of path, hub or demo"]),
        ("name=../escape", ["name", "pattern"]),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_key(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    experiment: dict[str, Any],
    change: str,
    words: list[str],
) -> None:
    config = write_config(tmp_path, experiment)
    message = attempt(capsys, train.main, "--config", str(config), "--set", change)
    assert all(word in message for word in words), message
    assert not (tmp_path / "runs").exists()


def with_rows(experiment: dict[str, Any], folder: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "columns": {"text": "text", "mood": "mood"}}
    return {**experiment, "tasks": {"mood": {"kind": "classification"}}, "data": [source]}


def test_mistakes_in_data_stop_the_run_before_ray_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, experiment: dict[str, Any]
) -> None:
    good = {"text": "fine", "mood": "good"}
    bad = with_rows(experiment, tmp_path, good, {"text": "  ", "mood": "bad"})
    message = attempt(capsys, train.main, "--config", str(write_config(tmp_path, bad)))
    assert "rows.jsonl:2" in message
    (tmp_path / "rows.jsonl").write_text('{"text": "fine", "mood": "good"}\n{"text": \n')
    message = attempt(capsys, train.main, "--config", str(write_config(tmp_path, bad)))
    assert "rows.jsonl:2" in message


@pytest.mark.parametrize(
    ("objective", "field"),
    [("mood/accuracy", "training.metric"), (["topic/accuracy", "mood/macro_f1"], "objective")],
)
def test_a_task_without_a_label_in_validation_is_nothing_to_choose_by(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    experiment: dict[str, Any],
    objective: str | list[str],
    field: str,
) -> None:
    rows = [{"text": f"row {i}", "topic": "ab"[i % 2], "mood": "cd"[i % 2]} for i in range(20)]
    for split, mood in (("train", {}), ("validation", {"mood": None})):
        lines = "".join(json.dumps(row | mood) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    columns = {name: name for name in ("text", "topic", "mood")}
    tasks = {task: {"kind": "classification"} for task in ("topic", "mood")}
    base = {**experiment, "tasks": tasks, "data": [{"path": str(tmp_path), "columns": columns}]}
    sweep = {
        "name": "small",
        "base": str(write_config(tmp_path, base)),
        "output_dir": str(tmp_path / "sweeps"),
        "objective": objective,
        "searcher": {"algorithm": "optuna"},
        "space": {"optim.learning_rate": {"loguniform": [1e-4, 1e-3]}},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    message = attempt(capsys, tune.main, "--config", str(tmp_path / "sweep.yaml"))
    assert f"error: {field}: mood/" in message
    assert "no text in validation has a label of task 'mood'" in message
    assert not (tmp_path / "sweeps").exists()


def test_skipped_rows_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, experiment: dict[str, Any]
) -> None:
    rows = [{"text": f"row {i}", "mood": "ab"[i % 2]} for i in range(20)]
    raw = with_rows(experiment, tmp_path, *rows, {"text": " ", "mood": "a"})
    raw["data"][0]["on_bad_row"] = "skip"
    data = prepare(parse_experiment(raw))
    assert sum(data.skipped.values()) == 1
    describe_data(data)
    assert "1 unreadable row(s) skipped" in capsys.readouterr().out


def test_a_text_of_a_hundred_thousand_characters_is_cut_and_counted(
    tmp_path: Path, experiment: dict[str, Any]
) -> None:
    rows = [{"text": f"row {i}", "mood": "ab"[i % 2]} for i in range(20)]
    raw = with_rows(experiment, tmp_path, {"text": "word " * 20_000, "mood": "a"}, *rows)
    splits = prepare(parse_experiment(raw)).splits
    assert sum(split.num_truncated for split in splits.values()) == 1
    assert max(split.lengths.max() for split in splits.values()) == 48


def test_an_unreachable_hub_says_what_to_do_without_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, experiment: dict[str, Any]
) -> None:
    for changes in (
        {"encoder": {"model": "nobody/no-such-model"}},
        {
            "tasks": {"a": {"kind": "classification"}},
            "data": [{"hub": "nobody/none", "columns": {"text": "t", "a": "l"}}],
        },
    ):
        config = write_config(tmp_path, {**experiment, **changes})
        message = attempt(capsys, train.main, "--config", str(config))
        assert "HF_HOME" in message


def test_an_artifact_to_start_from_is_checked_before_ray_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, experiment: dict[str, Any]
) -> None:
    def message(artifact: Path) -> str:
        config = write_config(tmp_path, {**experiment, "init_from": str(artifact)})
        return attempt(capsys, train.main, "--config", str(config))

    assert f"{tmp_path / 'nowhere'}: no such folder" in message(tmp_path / "nowhere")
    assert "manifest.json: missing" in message(tmp_path)
    start = small_runs.experiment(experiment["encoder"]["model"])
    model = small_runs.build_train_state(start, small_runs.data(start)).model
    artifact = small_runs.write_artifact(model, start, tmp_path / "artifact")
    head = artifact / "heads/mood/head.safetensors"
    head.write_bytes(head.read_bytes()[:100])
    assert f"{head}: damaged: its hash" in message(artifact)
    head.unlink()
    assert f"{head}: missing" in message(artifact)
    assert not (tmp_path / "runs").exists()


def test_resume_insists_on_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, experiment: dict[str, Any]
) -> None:
    config = str(write_config(tmp_path, experiment))
    assert "holds no run" in attempt(capsys, train.main, "--config", config, "--resume")


def test_what_is_no_artifact_is_refused_by_every_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for main, more in (
        (predict.main, ["--text", "a"]),
        (evaluate.main, []),
        (similarity.main, ["--text", "a", "b"]),
    ):
        message = attempt(capsys, main, "--artifact", str(tmp_path), *more)
        assert "manifest.json: missing" in message


def test_sentences_to_compare_that_are_no_utf8_are_refused_with_the_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_bytes("fine 🙂\ncafé\n".encode() + "café\n".encode("latin-1"))
    message = attempt(capsys, similarity.main, "--artifact", "none", "--input", str(lines))
    assert "lines.txt:3: not UTF-8: byte 0xe9" in message


def test_an_encoder_head_mismatch_is_refused(tmp_path: Path, experiment: dict[str, Any]) -> None:
    raw = {**experiment, "encoder": {**experiment["encoder"], "max_length": 5000}}
    with pytest.raises(ValueError, match=r"encoder\.max_length: 5000 is more than"):
        build_model(parse_experiment(raw), {"sentiment": ("a", "b"), "entities": ("x",)})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("in.jsonl", "", ["in.jsonl has no readable row"]),
        ("in.jsonl", "\n  \n", ["in.jsonl has no readable row"]),
        ("in.csv", "id,text\n", ["in.csv has no readable row"]),
        ("in.parquet", "", ["in.parquet is no Parquet file"]),
        ("in.jsonl", '{"id": 1, "sentence": "a"}\n', ["no column 'text'", "it has id, sentence"]),
        ("in.csv", "id,sentence\n1,a\n", ["no column 'text'", "it has id, sentence"]),
        ("in.csv", 'id,text\n1,a\n2,"b\n3,c\n', ["in.csv:3: unexpected end of data", "quotes"]),
        ("in.txt", "a\n", ["in.txt should end in one of .jsonl, .csv, .parquet"]),
    ],
)
def test_a_file_to_predict_for_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
    words: list[str],
) -> None:
    monkeypatch.setattr(predict, "ray_cluster", None)
    source, target = tmp_path / name, tmp_path / "out.jsonl"
    source.write_text(content, encoding="utf-8")
    message = attempt(capsys, predict_for, str(source), str(target))
    assert all(word in message for word in words), message
    assert not target.exists()


def test_a_parquet_file_without_rows_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), source)
    message = attempt(capsys, predict_for, str(source), str(tmp_path / "out.jsonl"))
    assert "in.parquet has no readable row" in message


def test_columns_that_parquet_cannot_hold_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a", "id": 1}\n' * 2000 + '{"text": "a", "id": "x"}\n')
    message = attempt(capsys, predict_for, str(source), str(tmp_path / "out.parquet"))
    assert "--output: Parquet cannot hold" in message
    assert "write .jsonl" in message


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_an_output_that_exists_is_neither_resumed_nor_replaced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / name
    source.write_text('{"text": "a"}\n' * 10)
    target.write_text("half of an answer")
    message = attempt(capsys, predict_for, str(source), str(target))
    assert f"{name} exists; remove it, or add --overwrite" in message
    assert target.read_text() == "half of an answer"


def predict_for(arguments: list[str]) -> None:
    """`predict` for a file as far as it gets without an artifact."""
    source, target = map(Path, arguments)
    predict.predict_file("none", source, target, "text")
