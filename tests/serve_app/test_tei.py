"""The routes of Text Embeddings Inference: its shapes, its limits, its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_core.predictor import Predictor
from serve_app.errors import unavailable
from tests.servers import call, local_server

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
    with local_server(artifact, runtime="torch-fp32", max_inputs=3) as (url, _):
        assert call(f"{url}/info").body["max_client_batch_size"] == 3
        for route in ("embed", "predict?task=topic", "tokenize"):
            assert call(f"{url}/{route}", {"inputs": ["a"] * 3}).status == 200
            refused = call(f"{url}/{route}", {"inputs": ["a"] * 4})
            assert refused.status == 413
            assert refused.body["error_type"] == "Validation"
            assert "at most 3" in refused.body["error"]


def test_answers_tell_where_the_time_went(local_url: str) -> None:
    headers = call(f"{local_url}/embed", {"inputs": TEXTS}).headers
    parts = ("tokenization", "queue", "inference")
    spent = [float(headers[f"x-{part}-time"]) for part in parts]
    assert all(milliseconds >= 0 for milliseconds in spent)
    assert float(headers["x-total-time"]) >= max(spent)
    assert headers["x-compute-type"] == "torch-fp32"
