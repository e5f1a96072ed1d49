"""What `evaluate` scores: files whole, the test file of folders, heads that came from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtl_core.artifact import load_config, load_model
from mtl_core.build import build_train_state
from mtl_core.config import SourceConfig
from mtl_core.errors import ConfigError, DataError
from mtl_core.predictor import Predictor
from tests.small_runs import data, examples, experiment, write_artifact, write_rows
from train_jobs import evaluate
from train_jobs.predict import check_tasks

ROWS = examples(500, 24, everything=True)


@pytest.fixture(scope="module")
def artifact(tiny_encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of three tasks, made from JSON lines in files of another name."""
    config = experiment(tiny_encoders["bert"])
    source = config.data[0].model_copy(update={"path": "none.txt", "format": "jsonl"})
    config = config.model_copy(update={"data": (source,)})
    model = build_train_state(config, data(config)).model
    return write_artifact(model, config, tmp_path_factory.mktemp("scored") / "artifact")


@pytest.fixture(scope="module")
def accuracy(artifact: Path) -> float:
    """How often the predictor is right about the topic of a row."""
    answers = Predictor.load(artifact).predict([row.text for row in ROWS], ["topic"])
    right = [a["topic"]["label"] == r.targets["topic"] for a, r in zip(answers, ROWS, strict=True)]
    return sum(right) / len(ROWS)


def scored(artifact: Path | str, folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON report of an evaluation."""
    report = folder / "report.json"
    evaluate.main(["--artifact", str(artifact), *arguments, "--output", str(report)])
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def support(report: dict[str, Any], task: str) -> int:
    return sum(row["support"] for row in report[task]["labels"].values())


@pytest.mark.parametrize("name", ["rows.txt", "test.jsonl", "train.jsonl"])
def test_a_file_is_scored_whole_whatever_it_is_called_and_lies_beside(
    artifact: Path, accuracy: float, tmp_path: Path, name: str
) -> None:
    for other in ("train.jsonl", "validation.jsonl", "test.jsonl"):
        write_rows(tmp_path / other, ROWS[:3])
    path = write_rows(tmp_path / name, ROWS)
    report = scored(artifact, tmp_path, "--data", f"topic={path}")
    assert set(report) == {"topic"}
    assert support(report, "topic") == len(ROWS)
    assert report["topic"]["scores"]["accuracy"] == pytest.approx(accuracy)


def test_of_a_folder_the_test_file_is_scored(
    artifact: Path, accuracy: float, tmp_path: Path
) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS[:3])
    write_rows(tmp_path / "test.jsonl", ROWS)
    files = ("--data", f"topic={tmp_path}", "--data", f"entities={tmp_path}")
    report = scored(artifact, tmp_path, *files)
    assert report["topic"]["scores"]["accuracy"] == pytest.approx(accuracy)
    assert support(report, "entities") == 2 * len(ROWS)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match=f"{tmp_path}: no labelled rows; give a file, or a folder"):
        scored(artifact, tmp_path, *files)


def test_rows_that_are_skipped_are_told(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(artifact)
    source = config.data[0].model_copy(update={"on_bad_row": "skip"})
    skipping = write_artifact(
        load_model(artifact), config.model_copy(update={"data": (source,)}), tmp_path / "skipping"
    )
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with path.open("a") as file:
        file.write('{"text": " ", "topic": "food"}\n')
    assert support(scored(skipping, tmp_path, "--data", f"topic={path}"), "topic") == len(ROWS)
    assert f"{path}: 1 unreadable row(s) skipped\n" in capsys.readouterr().out


def test_a_path_that_is_not_there_is_named(artifact: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"row\.jsonl: no such file or .* mean 'rows\.jsonl'"):
        scored(artifact, tmp_path, "--data", f"topic={path.with_name('row.jsonl')}")
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        scored(artifact, tmp_path, "--data", f"topic={tmp_path / 'nowhere'}")


def test_a_misspelt_task_is_answered_with_the_nearest(artifact: Path, tmp_path: Path) -> None:
    told = r"unknown task 'topics'; did you mean 'topic'\? there is: topic, mood, entities"
    with pytest.raises(ConfigError, match=rf"--data topics=rows\.jsonl: {told}"):
        scored(artifact, tmp_path, "--data", "topics=rows.jsonl")
    with pytest.raises(ConfigError, match=f"--task: {told}"):
        check_tasks(artifact, ["mood", "topics"])


def test_a_split_of_other_data_is_refused(artifact: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match="--split: what --data names is scored whole"):
        scored(artifact, tmp_path, "--split", "train", "--data", f"topic={path}")


def test_heads_that_came_with_init_from_are_named_and_scored_on_data_given(
    artifact: Path, accuracy: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "test.jsonl").write_bytes(rows.read_bytes())
    (tmp_path / "train.jsonl").write_bytes(rows.read_bytes())
    config = load_config(artifact)
    source = SourceConfig(path=str(tmp_path), columns={"text": "text", "mood": "mood"})
    own = config.model_copy(update={"tasks": {"mood": config.tasks["mood"]}, "data": (source,)})
    added = write_artifact(load_model(artifact), own, tmp_path / "added")

    assert set(scored(added, tmp_path)) == {"mood"}
    output = capsys.readouterr().out
    assert "not scored, for want of their data: topic, entities; give --data TASK=PATH" in output

    report = scored(added, tmp_path, "--data", f"topic={rows}", "--data", f"entities={rows}")
    assert set(report) == {"topic", "entities"}
    assert support(report, "topic") == len(ROWS)
    assert support(report, "entities") == 2 * len(ROWS)
    assert report["topic"]["scores"]["accuracy"] == pytest.approx(accuracy)
    assert "not scored" not in capsys.readouterr().out
