"""Runtimes: OpenVINO gives what torch gives, is converted once, and what is not there is said."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from mtl_core import predictor
from mtl_core import runtime as runtimes
from mtl_core.artifact import load_encoder, read_manifest
from mtl_core.build import build_train_state
from mtl_core.errors import ArtifactError, ConfigError
from mtl_core.folders import one_at_a_time
from mtl_core.packing import Layout, pack
from mtl_core.predictor import EncodingStage, Predictor
from mtl_core.runtime import (
    NUM_PACKED_INPUTS,
    PACKING,
    TorchRuntime,
    choose_runtime,
    inputs,
    load_runtime,
    passes,
)
from tests.conftest import SENTENCES
from tests.small_runs import data, example, experiment, learned, write_artifact

ENCODERS = ["bert", "distilbert", "roberta", "deberta-v2", "mpnet"]
POOLED = [*((name, "mean") for name in ENCODERS), ("bert", "cls"), ("roberta", "max")]
CPU = torch.device("cpu")
TEXTS = [*SENTENCES, "Zoë", " ".join(SENTENCES), "x" * 200]


def untrained(encoder: Path, folder: Path, pooling: str = "mean") -> Path:
    config = experiment(encoder, encoder={"pooling": pooling})
    return write_artifact(build_train_state(config, data(config)).model, config, folder)


def features(folder: Path, runtime: Any) -> Any:
    stage = EncodingStage.load(folder, runtime=runtime, threads=1)
    items = stage.windows.split(TEXTS)
    return stage.encode(items, [True] * len(items))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pooling"), POOLED)
def test_openvino_gives_what_torch_gives(
    name: str, pooling: str, tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    folder = untrained(tiny_encoders[name], tmp_path / "artifact", pooling)
    expected, found = features(folder, "torch-fp32"), features(folder, "openvino-fp32")
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    assert found.states.dtype == expected.states.dtype == np.float32
    np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-4)
    np.testing.assert_allclose(found.states, expected.states, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "threads"), [("bert", 1), ("bert", 2), ("roberta", 2)])
def test_a_text_has_the_same_states_in_a_row_with_others(
    name: str, threads: int, tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    folder = untrained(tiny_encoders[name], tmp_path / "artifact")
    manifest = read_manifest(folder)
    encoder = load_encoder(folder, manifest).eval()
    runtime = load_runtime("openvino-fp32", folder, manifest, lambda: encoder, CPU, threads)
    assert runtime.streams == threads
    sequences = [
        encoder.tokenizer(text, truncation=True, max_length=48)["input_ids"] for text in TEXTS
    ]
    layouts = list(pack(sequences, 0, 4096, threads))
    assert len(layouts) == threads
    assert sum(len(layout.input_ids) for layout in layouts) < len(TEXTS)
    for layout, states, vectors in passes(runtime, sequences, 0, 4096):
        for row, (number, start) in enumerate(zip(layout.numbers, layout.starts, strict=True)):
            ids = torch.tensor([sequences[number]])
            with torch.inference_mode():
                alone, pooled = encoder(ids, torch.ones_like(ids))
            here = states[start : start + ids.shape[1]]
            np.testing.assert_allclose(here, alone[0], atol=1e-4)
            np.testing.assert_allclose(vectors[row], pooled[0], atol=1e-4)


@pytest.mark.parametrize("name", PACKING)
def test_every_model_that_packs_attends_within_a_text_only(name: str) -> None:
    settings = AutoConfig.for_model(
        name,
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=1,
    )
    encoder: Any = SimpleNamespace(transformer=AutoModel.from_config(settings).eval())
    texts = [list(range(10, 10 + length)) for length in (20, 9, 30, 4)]
    (layout,) = pack(texts, 1, 4096)
    arrays = [torch.from_numpy(array) for array in inputs(layout, NUM_PACKED_INPUTS).values()]
    with torch.inference_mode():
        states = runtimes._Packed(encoder)(*arrays).flatten(0, 1)
        for number, start in zip(layout.numbers, layout.starts, strict=True):
            alone = encoder.transformer(torch.tensor([texts[number]])).last_hidden_state[0]
            torch.testing.assert_close(states[start : start + len(alone)], alone)


@pytest.fixture(scope="module")
def expert(tiny_encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    state, _, _ = learned(tiny_encoders["bert"])
    folder = tmp_path_factory.mktemp("expert") / "artifact"
    return write_artifact(state.model, experiment(tiny_encoders["bert"]), folder)


@pytest.mark.parametrize(
    "runtime",
    [
        "torch-bf16",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("openvino-bf16", "openvino-fp32", "auto")
        ),
    ],
)
def test_a_faster_runtime_gives_mostly_the_same_labels(runtime: Any, expert: Path) -> None:
    texts = [example(number, {"topic"}).text for number in range(80)]
    exact: list[Any] = Predictor.load(expert).predict(texts)
    near: list[Any] = Predictor.load(expert, runtime=runtime, threads=1).predict(texts)
    same = [a["topic"]["label"] == b["topic"]["label"] for a, b in zip(exact, near, strict=True)]
    assert np.mean(same) >= (1.0 if runtime == "openvino-fp32" else 0.95)
    shifts = [
        abs(a["topic"]["scores"][label] - b["topic"]["scores"][label])
        for a, b in zip(exact, near, strict=True)
        for label in a["topic"]["scores"]
    ]
    assert np.mean(shifts) < (1e-5 if runtime == "openvino-fp32" else 0.02)
    words = [
        [[e["word"] for e in answer["entities"]] for answer in answers] for answers in (exact, near)
    ]
    assert np.mean([a == b for a, b in zip(*words, strict=True)]) >= 0.95


@pytest.mark.slow
def test_an_encoder_is_converted_once(
    tiny_encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    folder = untrained(tiny_encoders["bert"], tmp_path / "artifact")
    manifest, loads = read_manifest(folder), []

    def load() -> Any:
        loads.append(1)
        return load_encoder(folder, manifest)

    sequences = [[2, 5, 6, 3], [2, 5, 3]]
    answers = []
    for name in ("openvino-fp32", "openvino-fp32", "openvino-bf16"):
        runtime = load_runtime(name, folder, manifest, load, CPU, 1)  # type: ignore[arg-type]
        assert runtime.name == name
        ((_, *arrays),) = passes(runtime, sequences, 0, 64)
        answers.append([array.copy() for array in arrays])
    assert len(loads) == 1
    for one, again in zip(*answers[:2], strict=True):
        np.testing.assert_array_equal(one, again)
    other = untrained(tiny_encoders["roberta"], tmp_path / "other")
    manifest = read_manifest(other)
    load_runtime("openvino-fp32", other, manifest, lambda: load_encoder(other, manifest), CPU)
    assert len(list((tmp_path / "cache" / "openvino").glob("*/encoder.xml"))) == 2


@pytest.mark.slow
def test_what_another_process_converts_is_waited_for(
    tiny_encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    folder = untrained(tiny_encoders["bert"], tmp_path / "artifact")
    manifest = read_manifest(folder)

    def load() -> Any:
        return load_encoder(folder, manifest)

    @contextmanager
    def after_another(lock: Path) -> Iterator[bool]:
        monkeypatch.setattr(runtimes, "one_at_a_time", one_at_a_time)
        load_runtime("openvino-fp32", folder, manifest, load, CPU, 1)
        yield lock.is_file()

    monkeypatch.setattr(runtimes, "one_at_a_time", after_another)
    load_runtime("openvino-fp32", folder, manifest, lambda: pytest.fail("twice"), CPU, 1)


@pytest.mark.slow
@pytest.mark.parametrize("claim", ["the other's", "../" * 5 + "elsewhere"])
def test_an_artifact_that_claims_anothers_hash_gets_its_own_encoder(
    claim: str, tiny_encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "a" / "b" / "cache"))
    other = untrained(tiny_encoders["bert"], tmp_path / "other")
    features(other, "openvino-fp32")
    folder = untrained(tiny_encoders["distilbert"], tmp_path / "artifact")
    manifest = json.loads((folder / "manifest.json").read_text())
    theirs = read_manifest(other).encoder["sha256"]
    manifest["encoder"]["sha256"] = claim.replace("the other's", theirs)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found, expected = features(folder, "openvino-fp32"), features(folder, "torch-fp32")
    np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-4)
    assert len(list((tmp_path / "a" / "b" / "cache" / "openvino").glob("*/encoder.xml"))) == 2
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "loads"), [(EncodingStage, "load_encoder"), (Predictor, "load_model")]
)
def test_an_encoder_that_is_replaced_while_it_is_read_is_not_kept_as_the_other_one(
    kind: Any,
    loads: str,
    when: str,
    tiny_encoders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    folder = untrained(tiny_encoders["bert"], tmp_path / "artifact")
    other = untrained(tiny_encoders["distilbert"], tmp_path / "other")
    load = getattr(predictor, loads)

    def replaced(*arguments: Any) -> Any:
        found = load(*arguments)
        folder.rename(tmp_path / "retired")
        other.rename(folder)
        return found if when == "after" else load(*arguments)

    monkeypatch.setattr(predictor, loads, replaced)
    with pytest.raises(ArtifactError, match="replaced while it was read"):
        kind.load(folder, runtime="openvino-fp32")
    assert not list(tmp_path.glob("cache/openvino/*/encoder.xml"))


def never() -> Any:
    raise AssertionError("nothing may be loaded")


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 3), ("200000 100000", 2), ("900000 100000", 3), ("50000 100000", 1), ("", 3)],
)
def test_a_container_uses_the_cpus_it_is_given(
    quota: str, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(runtimes, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    assert runtimes.usable_cpus() == cpus


def test_torch_takes_the_threads_it_is_given(expert: Path) -> None:
    manifest = read_manifest(expert)
    encoder = load_encoder(expert, manifest)

    def run(runtime: Any, threads: int) -> tuple[int, int]:
        torch.set_num_threads(threads)
        list(passes(runtime, [[5, 6, 7]], 0, 64))
        return threads, torch.get_num_threads()

    given = load_runtime("torch-fp32", expert, manifest, lambda: encoder, CPU, threads=1)
    own = load_runtime("torch-fp32", expert, manifest, lambda: encoder, CPU)
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(run, given, 3).result() == (3, 1)
            assert pool.submit(run, own, 3).result() == (3, 3)
    finally:
        torch.set_num_threads(before)


class Anywhere:
    """Stands for an encoder, on a device that need not be there."""

    def to(self, _: torch.device) -> Anywhere:
        return self

    def eval(self) -> Anywhere:
        return self


def test_a_gpu_takes_texts_of_more_lengths_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: Any, layout: Layout) -> tuple[Any, Any]:
        return np.zeros((*layout.input_ids.shape, 1)), np.zeros((len(layout.numbers), 1))

    def count(device: str) -> int:
        encoder: Any = Anywhere()
        runtime = TorchRuntime(encoder, torch.device(device))
        return len(list(passes(runtime, [[5] * 8 * n for n in range(1, 33)], 0, 1 << 14)))

    monkeypatch.setattr(TorchRuntime, "_run", run)
    assert (count("cpu"), count("cuda")) == (8, 1)


def test_what_cannot_be_had_is_said(expert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(expert)
    wrong: Any = "tensorrt"
    with pytest.raises(ConfigError, match="unknown runtime 'tensorrt'; there is: auto, torch-fp32"):
        load_runtime(wrong, expert, manifest, never, CPU)
    with pytest.raises(ConfigError, match="holds no int8 encoder; make and check one with"):
        load_runtime("openvino-int8", expert, manifest, never, CPU)
    with pytest.raises(ConfigError, match="runs on CPUs; use torch-bf16 on cuda"):
        load_runtime("openvino-bf16", expert, manifest, never, torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install openvino"):
        load_runtime("openvino-bf16", expert, manifest, never, CPU)
    assert choose_runtime(expert, CPU) == "torch-fp32"


def test_auto_takes_the_best_that_is_there(
    expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bf16, expected in ((True, "openvino-bf16"), (False, "openvino-fp32")):
        monkeypatch.setattr("mtl_core.runtime.use_bf16", lambda *_, has=bf16: has)
        assert choose_runtime(expert, CPU) == expected
    for bf16, expected in ((True, "torch-bf16"), (False, "torch-fp32")):
        monkeypatch.setattr("mtl_core.runtime.use_bf16", lambda *_, has=bf16: has)
        assert choose_runtime(expert, torch.device("cuda")) == expected
    (tmp_path / "runtime" / "openvino-int8").mkdir(parents=True)
    (tmp_path / "runtime" / "openvino-int8" / "encoder.xml").touch()
    assert choose_runtime(tmp_path, CPU) == "openvino-int8"
