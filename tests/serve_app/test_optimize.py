"""The int8 encoder: kept only where no task loses and this processor gains; `auto` follows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_core.artifact import read_manifest
from mtl_core.config import Experiment
from mtl_core.predictor import Predictor
from mtl_core.runtime import INT8_FOLDER, Runtime, choose_runtime, convert
from serve_app import optimize as command
from serve_app.optimize import optimize
from tests.small_runs import examples, experiment, learned, write_artifact, write_rows

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tiny_encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks that a model knows by heart, and the files that it learned them from."""
    folder = tmp_path_factory.mktemp("trained")
    state, _, _ = learned(tiny_encoders["bert"])
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", examples(0, 32, everything=True))
    settings = experiment(tiny_encoders["bert"]).model_dump(mode="json")
    settings["data"][0]["path"] = str(folder)
    return write_artifact(state.model, Experiment.model_validate(settings), folder / "artifact")


@pytest.fixture
def artifact(trained: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return shutil.copytree(trained, tmp_path / "artifact")


def report(artifact: Path) -> dict[str, Any]:
    text = (artifact / "runtime" / "report.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def as_it_is(model: Any, _: Any, __: Any, path: Path) -> None:
    """In quantisation's place: an encoder that loses nothing."""
    import openvino

    openvino.save_model(convert(model.encoder), path, compress_to_fp16=False)


def ruined(model: Any, data: Any, recipe: Any, path: Path) -> None:
    """In quantisation's place: an encoder that tells no two words apart."""
    weights = model.encoder.transformer.get_input_embeddings().weight
    kept = weights.detach().clone()
    with torch.no_grad():
        weights.zero_()
        as_it_is(model, data, recipe, path)
        weights.copy_(kept)


def clock(int8: float) -> Callable[[Runtime, Any], float]:
    """In the clock's place: a second for every runtime, and so long for int8."""
    return lambda runtime, _: int8 if runtime.name.startswith("int8") else 1.0


@pytest.mark.parametrize(
    ("seconds", "kept", "said"),
    [
        (0.5, True, "kept int8 (mixed), 2.00 x as fast as openvino-"),
        (1.0, False, "int8 (mixed) loses nothing, but is 1.00 x as fast as openvino-"),
    ],
    ids=["faster", "as fast"],
)
def test_an_int8_encoder_that_loses_nothing_must_be_faster_too(
    seconds: float,
    kept: bool,
    said: str,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "quantize", as_it_is)
    monkeypatch.setattr(command, "seconds", clock(seconds))
    earlier = artifact / INT8_FOLDER
    earlier.mkdir(parents=True)
    (earlier / "encoder.xml").write_text("of an earlier run")
    assert optimize(artifact) is kept
    assert said in capsys.readouterr().out
    assert (artifact / INT8_FOLDER / "encoder.xml").is_file() is kept
    assert (choose_runtime(artifact, CPU) == "openvino-int8") is kept
    assert (report(artifact)["kept"] == "int8 (mixed)") is kept
    read_manifest(artifact)  # its hashes cover what was added


def test_every_recipe_is_tried_before_int8_is_given_up(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "quantize", ruined)
    monkeypatch.setattr(command, "seconds", clock(0.5))
    assert not optimize(artifact)
    assert "no int8 encoder stays within 0.2 points" in capsys.readouterr().out
    assert not (artifact / INT8_FOLDER).exists()
    told = report(artifact)
    names = [row["runtime"] for row in told["measured"]]
    tried = [f"int8 ({recipe})" for recipe in command.RECIPES]
    assert names == ["torch-fp32", "openvino-fp32", "openvino-bf16", *tried]
    assert all(max(row["losses"].values()) > told["tolerance"] for row in told["measured"][3:])
    assert told["times_as_fast"] == {}


def test_nncf_makes_an_encoder_that_answers_the_same(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "seconds", clock(0.5))
    assert optimize(artifact, tolerance=1.0)
    assert report(artifact)["tolerance"] == 1.0
    model = artifact / INT8_FOLDER / "encoder.xml"
    assert "FakeQuantize" in model.read_text(encoding="utf-8")
    texts = [example.text for example in examples(0, 32, everything=True)]
    exact: list[Any] = Predictor.load(artifact).predict(texts)
    int8: list[Any] = Predictor.load(artifact, runtime="openvino-int8", threads=1).predict(texts)
    same = [a["topic"]["label"] == b["topic"]["label"] for a, b in zip(exact, int8, strict=True)]
    assert sum(same) >= 31
