"""/v1/predict and /v1/similarity: what `Predictor` says offline, whoever else is asking."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl_core.predictor import Predictor
from tests.servers import Answer, call, metric
from tests.small_runs import example

TASKS = ["topic", "mood", "entities"]
SENTENCE = "Maria Lopez had the food at the table in São Paulo wonderful"
MIXED = [
    SENTENCE,
    "Zoë",
    "日本語 東京 は とても 楽しい 町 です",
    "👍🏽🙂 cafe\u0301 naïve re\u0301sume\u0301 \u200f שלום עולם مرحبا",
    "👩‍👩‍👧 Maria Lopez had a new phone in Grand Hotel",
    "a\u0000b \u0000",
    "\u0000",
    "\ufeff\ufffe\U0010ffff\u2028",
    "[SEP] </s> <s>",
    "  leading and trailing space\t\n",
]
LONG = " ".join(example(number, set(TASKS)).text for number in range(12))
"""Some windows long."""


def predict(url: str, inputs: str | list[str], **options: Any) -> Answer:
    return call(f"{url}/v1/predict", {"inputs": inputs, "return_scores": True, **options})


def assert_close(left: Any, right: Any) -> None:
    """The same answers, probabilities to 1e-5: sums differ with the company in a batch."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_close(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_close(one, other)
    elif isinstance(left, float):
        assert left == pytest.approx(right, abs=1e-5)
    else:
        assert left == right


@pytest.mark.parametrize("texts", [[SENTENCE], MIXED, [SENTENCE] * 3 + ["Zoë"] * 60])
def test_answers_are_the_offline_ones(
    texts: list[str], local_url: str, predictor: Predictor
) -> None:
    answer = predict(local_url, texts)
    assert answer.status == 200
    assert answer.body["results"] == predictor.predict(texts)
    assert answer.body["model"] == "small"
    tokens = sum(item.num_tokens for item in predictor.tokenize(texts))
    assert answer.body["usage"] == {"tokens": tokens}
    assert answer.headers["x-compute-tokens"] == str(tokens)
    assert answer.headers["x-compute-characters"] == str(sum(map(len, texts)))


def test_a_text_alone_is_a_list_of_one(local_url: str) -> None:
    one, listed = predict(local_url, SENTENCE), predict(local_url, [SENTENCE])
    assert one.body == listed.body


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(texts=st.lists(st.text(min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=4))
def test_any_unicode_is_answered_as_offline(
    texts: list[str], local_url: str, predictor: Predictor
) -> None:
    answer = predict(local_url, texts, truncate=True)
    assert answer.status == 200, answer.body
    assert answer.body["results"] == predictor.predict(texts)
    for text, row in zip(texts, answer.body["results"], strict=True):
        assert [text[e["start"] : e["end"]] for e in row["entities"]] == [
            e["word"] for e in row["entities"]
        ]


def test_escapes_and_plain_utf8_are_the_same_text(local_url: str) -> None:
    text = "👍🏽 Zoë in São Paulo 日本"
    escaped = json.dumps({"inputs": text}).encode()
    plain = json.dumps({"inputs": text}, ensure_ascii=False).encode()
    assert escaped != plain
    url = f"{local_url}/v1/predict"
    assert call(url, escaped).body == call(url, plain).body


@pytest.mark.parametrize("escape", [r"\ud800", r"\udc00", r"\ud83d x", r"\ude00\ud83d"])
def test_half_a_surrogate_pair_is_no_text(escape: str, local_url: str) -> None:
    answer = call(f"{local_url}/v1/predict", f'{{"inputs": "Zoe {escape}"}}'.encode())
    assert answer.status == 422
    assert "surrogate" in answer.body["error"]
    assert "Zoe" not in answer.body["error"]


def test_only_what_is_asked_for_is_given(local_url: str, predictor: Predictor) -> None:
    url = f"{local_url}/v1/predict"
    body = {"inputs": [SENTENCE, "Zoë"], "tasks": ["mood", "topic", "mood"]}
    results = call(url, body).body["results"]
    offline: Any = predictor.predict([SENTENCE, "Zoë"])
    assert [list(row) for row in results] == [["mood", "topic"]] * 2
    for row, expected in zip(results, offline, strict=True):
        topic = expected["topic"]
        assert row["topic"] == {"label": topic["label"], "score": topic["score"]}
        assert row["mood"] == {"labels": expected["mood"]["labels"]}
    answer = call(url, {"inputs": MIXED, "tasks": ["topic"], "return_embeddings": True}).body
    np.testing.assert_allclose(answer["embeddings"], predictor.embed(MIXED), atol=1e-6)


def test_a_long_text_loses_no_entity(local_url: str, predictor: Predictor) -> None:
    (item,) = predictor.tokenize([LONG])
    assert len(item.windows) > 4
    answer = predict(local_url, [LONG, SENTENCE], tasks=["entities"])
    assert answer.status == 200
    assert answer.body["results"] == predictor.predict([LONG, SENTENCE], ["entities"])
    found = answer.body["results"][0]["entities"]
    assert len(found) >= 12  # two in each sentence that it knows by heart, fewer in such company
    assert found[-1]["end"] > 0.9 * len(LONG)


def test_labels_of_a_long_text_are_given_only_on_request(
    local_url: str, predictor: Predictor
) -> None:
    for options in ({}, {"tasks": ["topic"]}, {"tasks": ["mood", "entities"]}):
        refused = predict(local_url, [SENTENCE, LONG], **options)
        assert refused.status == 413
        assert "input 2" in refused.body["error"]
        assert "truncate: true" in refused.body["error"]
        assert "Maria" not in refused.body["error"]
    vectors = {"tasks": ["entities"], "return_embeddings": True}
    assert predict(local_url, [SENTENCE, LONG], **vectors).status == 413
    taken = predict(local_url, [SENTENCE, LONG], truncate=True)
    assert taken.body["results"] == predictor.predict([SENTENCE, LONG])
    assert taken.body["truncated"] == [1]
    for options in ({"inputs": SENTENCE}, {"inputs": LONG, "tasks": ["entities"]}):
        whole = call(f"{local_url}/v1/predict", {**options, "truncate": True})
        assert "truncated" not in whole.body


def test_similarities_are_the_offline_cosines(local_url: str, predictor: Predictor) -> None:
    answer = call(f"{local_url}/v1/similarity", {"inputs": MIXED})
    np.testing.assert_allclose(answer.body["similarities"], predictor.similarity(MIXED), atol=1e-6)


def test_similarities_say_whose_beginning_alone_counted(local_url: str) -> None:
    def truncated(*inputs: str) -> Any:
        asked = {"inputs": inputs, "truncate": True}
        return call(f"{local_url}/v1/similarity", asked).body.get("truncated")

    assert truncated(SENTENCE, LONG) == [1]
    assert truncated(SENTENCE, SENTENCE) is None


def test_many_at_once_get_the_offline_answers_from_one_pass_a_window(
    local_url: str, predictor: Predictor
) -> None:
    draw = random.Random(3)
    pool = [*MIXED, LONG, *(example(number, set(TASKS)).text for number in range(30))]
    offline = dict(zip(pool, predictor.predict(pool), strict=True))
    windows = {text: len(predictor.tokenize([text])[0].windows) for text in pool}
    asked = [
        (
            draw.choices(pool, k=draw.choice([1, 1, 2, 5, 40])),
            draw.sample(TASKS, draw.randint(1, 3)),
        )
        for _ in range(160)
    ]

    def ask(request: tuple[list[str], list[str]]) -> Answer:
        return predict(local_url, request[0], tasks=request[1], truncate=True)

    before = metric(local_url, "mtl_encoder_passes_total"), metric(local_url, "mtl_texts_total")
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(ask, asked))
    for (texts, tasks), answer in zip(asked, answers, strict=True):
        assert answer.status == 200, answer.body
        assert_close(answer.body["results"], [{t: offline[x][t] for t in tasks} for x in texts])
    passes = sum(
        windows[text] if "entities" in tasks else 1 for texts, tasks in asked for text in texts
    )
    assert metric(local_url, "mtl_encoder_passes_total") - before[0] == passes
    assert metric(local_url, "mtl_texts_total") - before[1] == sum(len(t) for t, _ in asked)
    batches = metric(local_url, 'mtl_stage_seconds_count{stage="encoder"}')
    assert batches > 0
    assert metric(local_url, "mtl_batch_texts_sum") / batches > 1
    assert metric(local_url, "mtl_unanswered_texts") == 0
