"""The commands in an environment that knows no UTF-8, in a folder with an awkward name."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtl_core.artifact import read_manifest
from tests.commands import environment, run

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
IN_TURN = """
import json, runpy, sys
for sys.argv in map(json.loads, sys.argv[1:]):
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    print(end="\\f")
"""
"""Commands, each a list in JSON, in one process that imports the libraries once."""


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


def test_sentences_are_answered(folder: Path) -> None:
    command = ("predict", "--artifact", "runs/small/artifact", "--text", *TEXTS)
    shown = run(*command, folder=folder, **LATIN)
    assert shown.returncode == 0, shown.stderr
    assert "mood" in shown.stdout


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


def test_similarity_writes_utf8(folder: Path) -> None:
    options = ("--artifact", "runs/small/artifact", "--output")
    done = run("similarity", *options, "Bild ö.png", "--text", *TEXTS, folder=folder, **LATIN)
    assert done.returncode == 0, done.stderr
    with (folder / "Bild ö.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file))[1:] == TEXTS


def test_evaluation_writes_utf8_and_json_loses_no_sign(folder: Path) -> None:
    options = ("--artifact", "runs/small/artifact")
    evaluate = ("--output", "Zahlen ü.json", "--data", "mood=Sätze 🙂.jsonl")
    commands = (
        ["train_jobs.evaluate", *options, *evaluate],
        ["train_jobs.predict", *options, "--text", *TEXTS, "--json"],
    )
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, *(json.dumps(c, ensure_ascii=False) for c in commands)],
        cwd=folder,
        env=environment(None, **ASCII),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, lines, _ = done.stdout.split("\f")
    answers = [json.loads(line) for line in lines.splitlines()]
    assert [answer["text"] for answer in answers] == TEXTS
    assert {answer["mood"]["label"] for answer in answers} <= set(LABELS)
    report = json.loads((folder / "Zahlen ü.json").read_text(encoding="utf-8"))
    assert set(report["mood"]["labels"]) == set(LABELS)
