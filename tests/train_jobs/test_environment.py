"""The commands in an environment that knows no UTF-8, in a folder with an awkward name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtl_core.artifact import read_manifest
from tests.commands import run

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ASCII = {
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": "ascii",
    "TZ": "Pacific/Kiritimati",
}
LATIN = {**ASCII, "PYTHONIOENCODING": "latin-1", "TZ": "XYZ+23:59"}
TEXTS = ["東京 は とても 楽しい 🙂", "naïve café 👍🏽"]
LABELS = ("悲しい 🙁", "楽しい")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, experiment: dict[str, Any]) -> Path:
    """A working folder with a run that was trained in an environment of ASCII."""
    folder = tmp_path_factory.mktemp("work") / "Größe 100 % 東京 #1"
    folder.mkdir()
    rows = [{"text": f"{TEXTS[i % 2]} {i}", "mood": LABELS[i % 2]} for i in range(40)]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "Sätze 🙂.jsonl").write_text("".join(lines), encoding="utf-8")
    content = {
        **experiment,
        "tasks": {"mood": {"kind": "classification"}},
        "data": [{"path": "Sätze 🙂.jsonl", "columns": {"text": "text", "mood": "mood"}}],
        "training": {"epochs": 1, "batch_size": 8},
        "scale": {"workers": 1},
    }
    text = yaml.safe_dump(content, allow_unicode=True)
    (folder / "Versuch ä.yaml").write_text(text, encoding="utf-8")
    done = run("train", "--config", "Versuch ä.yaml", folder=folder, **ASCII)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.isascii()
    assert "mood" in done.stdout
    return folder


def test_training_leaves_files_in_utf8(folder: Path) -> None:
    artifact = folder / "runs/small/artifact"
    assert read_manifest(artifact).tasks["mood"]["labels"] == list(LABELS)
    assert "Sätze 🙂.jsonl" in (artifact / "experiment.yaml").read_text(encoding="utf-8")
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".yaml", ".md", ".txt"):
            path.read_bytes().decode("utf-8")


def test_sentences_are_answered_and_json_loses_no_sign(folder: Path) -> None:
    command = ("predict", "--artifact", "runs/small/artifact", "--text", *TEXTS)
    for environment in (ASCII, LATIN):
        shown = run(*command, folder=folder, **environment)
        assert shown.returncode == 0, shown.stderr
        assert "mood" in shown.stdout
    as_json = run(*command, "--json", folder=folder, **ASCII)
    answers = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == TEXTS
    assert {answer["mood"]["label"] for answer in answers} <= set(LABELS)


def test_prediction_for_a_file_writes_utf8(folder: Path) -> None:
    target = folder / "Antworten ß.csv"
    options = ("--artifact", "runs/small/artifact", "--overwrite")
    files = ("--input", "Sätze 🙂.jsonl", "--output", target.name)
    done = run("predict", *options, *files, folder=folder, **ASCII)
    assert done.returncode == 0, done.stderr
    with target.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == [f"{TEXTS[i % 2]} {i}" for i in range(40)]
    assert {row["predicted_mood"] for row in rows} <= set(LABELS)


def test_similarity_and_evaluation_write_utf8(folder: Path) -> None:
    options = ("--artifact", "runs/small/artifact", "--output")
    done = run("similarity", *options, "Bild ö.png", "--text", *TEXTS, folder=folder, **LATIN)
    assert done.returncode == 0, done.stderr
    with (folder / "Bild ö.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file))[1:] == TEXTS
    data = ("--data", "mood=Sätze 🙂.jsonl")
    done = run("evaluate", *options, "Zahlen ü.json", *data, folder=folder, **ASCII)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "Zahlen ü.json").read_text(encoding="utf-8"))
    assert set(report["mood"]["labels"]) == set(LABELS)
