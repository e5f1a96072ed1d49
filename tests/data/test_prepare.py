"""From an experiment to encoded splits, in this process and in another."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mtl_core.build import build_train_state
from mtl_core.config import Experiment, parse_experiment
from mtl_core.data import cache
from mtl_core.data.encoding import encode_split
from mtl_core.data.prepare import TOKENISING, prepare, prepare_scored, reopen
from mtl_core.errors import DataError
from tests.small_runs import write_artifact


@pytest.fixture
def experiment(
    tiny_encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Experiment:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    lines = [f'{{"text": "line {i}", "label": "{"ab"[i % 2]}"}}\n' for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return parse_experiment(
        {
            "name": "x",
            "tasks": {"t": {"kind": "classification"}},
            "data": [
                {"path": str(tmp_path / "train.jsonl"), "columns": {"text": "text", "t": "label"}}
            ],
            "encoder": {"model": str(tiny_encoders["bert"]), "max_length": 16},
        }
    )


def test_only_splits_with_rows_are_encoded(experiment: Experiment) -> None:
    data = prepare(experiment)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 18,
        "validation": 2,
    }
    assert data.keys.keys() == data.splits.keys()
    assert data.labels == {"t": ("a", "b")}


def test_a_metric_of_a_task_that_validation_has_no_label_of_is_refused(
    experiment: Experiment, tmp_path: Path
) -> None:
    mood = {"text": "fine", "label": "a", "mood": "good"}
    for name, row in (("train", mood), ("validation", {"text": "fine", "label": "a"})):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    raw = experiment.model_dump()
    raw["tasks"]["mood"] = {"kind": "classification"}
    columns = {"text": "text", "t": "label", "mood": "mood"}
    raw["data"] = [{"path": str(tmp_path), "columns": columns}]
    for metric in ("mean", "t", "t/macro_f1"):
        assert prepare(parse_experiment({**raw, "training": {"metric": metric}})).splits
    for metric in ("mood", "mood/macro_f1"):
        with pytest.raises(DataError, match=r"training\.metric: mood.* has a label of task 'mood'"):
            prepare(parse_experiment({**raw, "training": {"metric": metric}}))


def test_a_class_weight_of_no_label_is_refused(experiment: Experiment, tmp_path: Path) -> None:
    place = {"start": 0, "end": 4, "label": "word"}
    rows = [{"text": f"line {i}", "label": "ab"[i % 2], "places": [place]} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    raw = experiment.model_dump()
    raw["data"][0]["columns"]["places"] = "places"

    def weighted(t: dict[str, float], places: dict[str, float]) -> Experiment:
        kinds = {"t": "classification", "places": "token_classification"}
        weights = {"t": t, "places": places}
        tasks = {task: {"kind": kinds[task], "class_weights": weights[task]} for task in kinds}
        return parse_experiment({**raw, "tasks": tasks})

    assert prepare(weighted({"a": 2.0}, {"word": 2.0, "O": 0.5, "I-word": 3.0})).splits
    with pytest.raises(DataError, match=r"tasks\.t\.class_weights: no label 'c'; there is: a, b$"):
        prepare(weighted({"a": 2.0, "c": 3.0}, {}))
    with pytest.raises(DataError, match=r"places\.class_weights: .*'wrod'; did you mean 'word'\?"):
        prepare(weighted({}, {"wrod": 2.0}))


@pytest.mark.parametrize("same_machine", [True, False])
def test_another_process_opens_the_same_data(
    experiment: Experiment,
    same_machine: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = prepare(experiment)
    if same_machine:
        monkeypatch.setattr("mtl_core.encoder.load_tokenizer", None)  # nothing is tokenised again
    else:
        monkeypatch.setenv("MTL_CACHE", str(tmp_path / "elsewhere"))
    again = reopen(experiment, data.labels, data.keys)
    assert again.keys == data.keys
    for name, split in data.splits.items():
        assert np.array_equal(again.splits[name].input_ids, split.input_ids)
        assert np.array_equal(again.splits[name].targets["t"], split.targets["t"])


def test_processes_of_another_machine_make_them_once_though_one_that_does_is_killed(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, made = prepare(experiment), tmp_path / "made"

    def slowly(*arguments: Any) -> Any:
        with made.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1)
        return encode_split(*arguments)

    def makers() -> list[int]:
        return [int(line) for line in made.read_text().splitlines()] if made.exists() else []

    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(cache, "encode_split", slowly)
    context = multiprocessing.get_context("fork")
    arguments = (experiment, data.labels, data.keys)
    processes = [context.Process(target=reopen, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    while not makers():
        assert any(process.is_alive() for process in processes)
        time.sleep(0.01)
    killed = makers()[0]
    os.kill(killed, signal.SIGKILL)
    for process in processes:
        process.join()
    assert sorted(process.exitcode or 0 for process in processes) == [-signal.SIGKILL, 0, 0]
    train, validation, *more = [maker for maker in makers() if maker != killed]
    assert train == validation
    assert not more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("line 7", "line 8"), "texts of {} on .* differ from those that the run's driver found"),
        (('"b"', '"c"'), "{}: label 'c' of task 't' never occurs in train"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_another_machine_with_other_texts_is_refused(
    experiment: Experiment,
    split: str,
    change: tuple[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = {"path": str(tmp_path), "columns": {"text": "text", "t": "label"}}
    both = parse_experiment({**experiment.model_dump(), "data": [source]})
    lines = (tmp_path / "train.jsonl").read_text()
    for name in ("validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(lines)
    data = prepare(both)
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "alike"))
    untested = {name: key for name, key in data.keys.items() if name != "test"}
    assert set(reopen(both, data.labels, untested).splits) == {"train", "validation"}
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "elsewhere"))
    (tmp_path / f"{split}.jsonl").write_text(lines.replace(*change))
    with pytest.raises(DataError, match=message.format(split)):
        reopen(both, data.labels, data.keys)


def artifact_of(experiment: Experiment, folder: Path) -> Path:
    data = prepare(experiment)
    return write_artifact(build_train_state(experiment, data).model, experiment, folder, data)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "changed", [lambda lines: lines[::-1], lambda lines: lines[1:]], ids=["sorted anew", "deleted"]
)
def test_an_artifact_is_scored_on_what_was_carved_and_left_only_as_it_was(
    experiment: Experiment, split: Any, changed: Any, tmp_path: Path
) -> None:
    artifact, path = artifact_of(experiment, tmp_path / "artifact"), tmp_path / "train.jsonl"
    found = prepare_scored(artifact, split)
    assert (found.keys[split], found.notes) == (prepare(experiment).keys[split], ())
    path.write_text("".join(changed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(DataError, match=rf"^{split} has changed since .* --data\)$"):
        prepare_scored(artifact, split)
    (tmp_path / "aside.jsonl").write_text(path.read_text())
    divided = {"train": "train.jsonl", "validation": "aside.jsonl"}
    content = yaml.safe_load((artifact / "experiment.yaml").read_text())
    content["data"][0] |= {"path": str(tmp_path), "splits": divided}
    (artifact / "experiment.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match=f"^{split} has changed since"):  # it was carved then
        prepare_scored(artifact, split)
    assert len(prepare_scored(artifact, "test", experiment.data).splits["test"]) in (19, 20)
    assert len(prepare_scored(artifact, "train", limit=3).splits["train"]) == 3


@pytest.mark.parametrize("encoder", ["distilbert", "roberta", "deberta-v2", "mpnet"])
def test_every_tokenizer_knows_its_split_again(
    experiment: Experiment, encoder: str, tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    model = experiment.encoder.model_copy(update={"model": str(tiny_encoders[encoder])})
    artifact = artifact_of(experiment.model_copy(update={"encoder": model}), tmp_path / "artifact")
    assert prepare_scored(artifact, "validation").notes == ()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_of_its_own_that_has_changed_is_told_and_scored(
    experiment: Experiment, split: Any, tmp_path: Path
) -> None:
    source = {"path": str(tmp_path), "columns": {"text": "text", "t": "label"}}
    both = parse_experiment({**experiment.model_dump(), "data": [source]})
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    artifact = artifact_of(both, tmp_path / "artifact")
    assert prepare_scored(artifact, split).notes == ()
    (tmp_path / f"{split}.jsonl").write_text("".join(lines[1:]))
    found = prepare_scored(artifact, split)
    assert found.remarks == [f"{split} has changed since the artifact was made"]
    assert len(found.splits[split]) == 19
    (tmp_path / "test.jsonl").write_text('{"text": "x", "lable": "a"}')
    with pytest.raises(DataError, match=r"(?s)no labelled rows in test.*did you mean 'lable'"):
        prepare_scored(artifact, "test")


def test_another_release_of_the_tokenizers_may_be_why_a_split_differs(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, path = artifact_of(experiment, tmp_path / "artifact"), tmp_path / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    later = dict.fromkeys(TOKENISING, "99")
    monkeypatch.setattr("mtl_core.data.prepare.library_versions", lambda: later)
    path.write_text("".join(lines[::-1]))
    (note,) = prepare_scored(artifact, "validation").notes
    assert note.startswith("validation has changed since the artifact was made, or has the way it")
    path.write_text("".join(lines[1:]))
    with pytest.raises(DataError, match="train has changed"):
        prepare_scored(artifact, "train")


def test_the_tokenizer_is_of_the_models_revision(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(model: str, revision: str | None = None) -> Any:
        asked.append((model, revision))
        raise DataError("seen")

    monkeypatch.setattr("mtl_core.encoder.load_tokenizer", load)
    encoder = experiment.encoder.model_copy(update={"model": "some/model", "revision": "v2"})
    with pytest.raises(DataError, match="seen"):
        prepare(experiment.model_copy(update={"encoder": encoder}))
    assert asked == [("some/model", "v2")]
