"""The routes of Text Embeddings Inference: its shapes, its limits, its errors."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mtl_core.artifact import read_manifest, write_manifest
from mtl_core.predictor import Predictor
from serve_app.errors import unavailable
from serve_app.gate import timing_headers
from serve_app.service import Answer, Part
from tests.servers import call, local_server, metric

TEXTS = ["Maria Lopez had the food in Berlin", "Zoë 👍🏽 in São Paulo", "日本語 東京"]
LONG = "the song on a playlist " * 40


@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS])
def test_embed_gives_a_list_of_vectors(inputs: Any, local_url: str, predictor: Predictor) -> None:
    listed = [inputs] if isinstance(inputs, str) else inputs
    answer = call(f"{local_url}/embed", {"inputs": inputs})
    np.testing.assert_allclose(answer.body, predictor.embed(listed), atol=1e-6)
    raw = np.array(call(f"{local_url}/embed", {"inputs": inputs, "normalize": False}).body)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert (abs(lengths - 1) > 0.01).all()
    np.testing.assert_allclose(raw / lengths, answer.body, atol=1e-6)
    short = call(f"{local_url}/embed", {"inputs": inputs, "dimensions": 5}).body
    expected = raw[:, :5] / np.linalg.norm(raw[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)
    asked = {"inputs": inputs, "normalize": False, "dimensions": 5}
    np.testing.assert_array_equal(call(f"{local_url}/embed", asked).body, raw[:, :5])


def test_predict_gives_labels_by_probability(local_url: str, predictor: Predictor) -> None:
    expected = []
    for answer in predictor.predict(TEXTS, ["topic"]):
        topic: Any = answer["topic"]
        ordered = sorted(topic["scores"].items(), key=lambda item: -item[1])
        expected.append([{"label": label, "score": score} for label, score in ordered])
    url = f"{local_url}/predict?task=topic"
    assert call(url, {"inputs": TEXTS[0]}).body == expected[0]
    assert call(url, {"inputs": [[text] for text in TEXTS]}).body == expected
    assert call(url, {"inputs": TEXTS}).body == expected


def test_predict_wants_the_task_named_where_there_are_several(local_url: str) -> None:
    refused = call(f"{local_url}/predict", {"inputs": TEXTS[0]})
    assert refused.status == 422
    assert "?task=" in refused.body["error"]
    assert "topic, mood" in refused.body["error"]
    assert call(f"{local_url}/predict?task=weather", {"inputs": "a"}).status == 404
    entities = call(f"{local_url}/predict?task=entities", {"inputs": "a"})
    assert entities.status == 422
    assert "/tasks/entities" in entities.body["error"]
    pair = call(f"{local_url}/predict?task=topic", {"inputs": [["a", "b"]]})
    assert pair.status == 422
    assert "pairs" in pair.body["error"]
    raw = call(f"{local_url}/predict?task=topic", {"inputs": "a", "raw_scores": True})
    assert raw.status == 422
    assert "raw_scores" in raw.body["error"]


def test_predict_answers_for_the_only_classification_task(artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    manifest = read_manifest(folder)
    del manifest.tasks["mood"]
    write_manifest(folder, manifest)
    with local_server(folder, runtime="torch-fp32") as (url, _):
        named, unnamed = (
            call(f"{url}/predict{query}", {"inputs": TEXTS}) for query in ("?task=topic", "")
        )
        assert (unnamed.status, unnamed.body) == (200, named.body)
        (parameter,) = call(f"{url}/openapi.json").body["paths"]["/predict"]["post"]["parameters"]
        assert (parameter["name"], parameter["required"]) == ("task", False)
        assert parameter["schema"]["enum"] == ["topic"]


@pytest.mark.parametrize("special", [True, False])
def test_tokenize_gives_the_tokenizers_sub_words(
    special: bool, local_url: str, predictor: Predictor
) -> None:
    texts = [*TEXTS, LONG, "", " "]
    body = {"inputs": texts, "add_special_tokens": special}
    answer = call(f"{local_url}/tokenize", body)
    assert answer.status == 200
    for text, row in zip(texts, answer.body, strict=True):
        encoded = predictor.tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        assert [token["id"] for token in row] == encoded["input_ids"]
        names = predictor.tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        assert [token["text"] for token in row] == [
            name if token["special"] else text[token["start"] : token["stop"]]
            for name, token in zip(names, row, strict=True)
        ]
        assert [token["special"] for token in row] == [
            bool(mask) for mask in encoded["special_tokens_mask"]
        ]
        for token, place in zip(row, encoded["offset_mapping"], strict=True):
            wanted = (None, None) if token["special"] else tuple(place)
            assert (token["start"], token["stop"]) == wanted
    assert (
        call(f"{local_url}/tokenize", {"inputs": TEXTS[0]}).body
        == call(f"{local_url}/tokenize", {"inputs": TEXTS[:1]}).body
    )


def test_info_tells_what_is_served(local_url: str, predictor: Predictor) -> None:
    info = call(f"{local_url}/info").body
    assert info["model_id"] == "small"
    assert info["runtime"] == "torch-fp32"
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert info["tasks"] == {
        task: {"kind": head.kind, "labels": list(head.labels)}
        for task, head in predictor.model.head_items
    }
    assert info["max_input_length"] == predictor.model.encoder.max_length
    assert (info["max_client_batch_size"], info["max_batch_tokens"]) == (256, 2048)
    assert info["dimension"] == predictor.model.encoder.hidden_size


def test_health_and_ready_answer(local_url: str) -> None:
    assert call(f"{local_url}/health").status == 200
    assert call(f"{local_url}/ready").status == 200
    failing = unavailable("the head of task 'topic' is not available")
    assert (failing.status, failing.body()["error_type"]) == (503, "Unhealthy")


@pytest.mark.parametrize("route", ["embed", "predict?task=topic"])
def test_a_long_text_is_refused_unless_truncated(
    route: str, local_url: str, predictor: Predictor
) -> None:
    url = f"{local_url}/{route}"
    refused = call(url, {"inputs": LONG})
    assert refused.status == 413
    assert refused.body["error_type"] == "Validation"
    assert call(url, {"inputs": LONG, "truncate": None}).status == 413
    taken = call(url, {"inputs": LONG, "truncate": True})
    assert taken.status == 200
    if route == "embed":
        np.testing.assert_allclose(taken.body, predictor.embed([LONG]), atol=1e-6)


def test_a_document_counts_by_what_is_read_of_it(local_url: str, predictor: Predictor) -> None:
    window = predictor.model.encoder.max_length
    body = {"inputs": [LONG, LONG], "truncate": True}
    for route in ("embed", "predict?task=topic"):
        answer = call(f"{local_url}/{route}", body)
        assert answer.headers["x-compute-tokens"] == str(2 * window)
        assert answer.headers["x-compute-characters"] == str(2 * len(LONG))
    openai = call(f"{local_url}/v1/embeddings", {"input": LONG, "truncate": True}).body
    assert openai["usage"] == {"prompt_tokens": window, "total_tokens": window}
    whole = sum(item.num_tokens for item in predictor.tokenize([LONG]))
    both = call(f"{local_url}/v1/predict", {"inputs": LONG, "truncate": True}).body
    assert both["usage"] == {"tokens": whole}
    assert whole > 2 * window


def test_limits_are_those_that_info_tells(artifact: Path) -> None:
    limits: dict[str, Any] = {"max_inputs": 3, "max_waiting": 5, "batch_tokens": 7}
    with local_server(artifact, runtime="torch-fp32", **limits) as (url, _):
        info = call(f"{url}/info").body
        assert info["max_client_batch_size"] == 3
        assert info["max_concurrent_requests"] == 5
        assert info["max_batch_tokens"] == 7
        for route in ("embed", "predict?task=topic", "tokenize"):
            assert call(f"{url}/{route}", {"inputs": ["a"] * 3}).status == 200
            refused = call(f"{url}/{route}", {"inputs": ["a"] * 4})
            assert refused.status == 413
            assert refused.body["error_type"] == "Validation"
            assert "at most 3" in refused.body["error"]


def test_answers_tell_where_the_time_went(local_url: str) -> None:
    counted = 'mtl_request_seconds_count{route="/embed"}'
    before = metric(local_url, counted)
    headers = call(f"{local_url}/embed", {"inputs": TEXTS}).headers
    assert metric(local_url, counted) == before + 1
    parts = ("tokenization", "queue", "inference")
    spent = [float(headers[f"x-{part}-time"]) for part in parts]
    assert all(milliseconds >= 0 for milliseconds in spent)
    assert float(headers["x-total-time"]) >= max(spent)
    assert float(headers["x-compute-time"]) == pytest.approx(spent[0] + spent[2], abs=0.02)
    assert headers["x-compute-type"] == "torch-fp32"


def test_times_are_told_in_milliseconds_and_counts_as_they_are() -> None:
    model: Any = SimpleNamespace(stage=SimpleNamespace(runtime=SimpleNamespace(name="torch")))
    items: Any = [SimpleNamespace(text="x" * 20, num_tokens=4)]
    vectors = np.zeros((1, 2), np.float32)
    first = Part(items, vectors, {}, queue=0.0625, encoder=0.125, heads=0.125)
    second = Part(items, vectors, {}, queue=0.25, encoder=0.125, heads=0.0625)
    answer = Answer(model, [first, second], tokenize=0.5, beginnings=[])
    assert timing_headers(answer, total=1.0) == {
        "x-compute-type": "torch",
        "x-compute-time": "875.00",
        "x-total-time": "1000.00",
        "x-tokenization-time": "500.00",
        "x-queue-time": "62.50",
        "x-inference-time": "375.00",
        "x-compute-characters": "40",
        "x-compute-tokens": "8",
    }
