"""The `openai` client against /v1/embeddings: vectors, options and its classes of errors."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from mtl_core.answers import Features, Output
from mtl_core.predictor import Predictor
from serve_app.heads import LocalHead, StoredHead
from tests.servers import call, local_server, metric

TEXTS = ["Maria Lopez had the food in Berlin", "Zoë 👍🏽", "日本語 東京"]
LONG = "the song on a playlist " * 40


@pytest.fixture(scope="module")
def client(local_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{local_url}/v1", api_key="any", max_retries=0) as made:
        yield made


def vectors(reply: Any) -> Any:
    assert [item.index for item in reply.data] == list(range(len(reply.data)))
    return np.array([item.embedding for item in reply.data])


@pytest.mark.parametrize("texts", [TEXTS[0], TEXTS])
def test_vectors_are_the_offline_ones(
    texts: str | list[str], client: openai.OpenAI, predictor: Predictor
) -> None:
    listed = [texts] if isinstance(texts, str) else texts
    reply = client.embeddings.create(model="small", input=texts)  # the client asks for base64
    np.testing.assert_allclose(vectors(reply), predictor.embed(listed), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors(reply), axis=1), 1, atol=1e-6)
    assert reply.object == "list"
    assert reply.model == "small"
    tokens = sum(item.num_tokens for item in predictor.tokenize(listed))
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (tokens, tokens)


def test_a_key_that_is_null_counts_as_left_out(local_url: str) -> None:
    url = f"{local_url}/v1/embeddings"
    plain = call(url, {"input": TEXTS})
    assert isinstance(plain.body["data"][0]["embedding"], list)
    for key in ("encoding_format", "dimensions", "user", "model"):
        answer = call(url, {"input": TEXTS, key: None})
        assert (answer.status, answer.body) == (200, plain.body), key


def test_floats_and_base64_hold_the_same_vectors(client: openai.OpenAI) -> None:
    floats = client.embeddings.create(model="small", input=TEXTS, encoding_format="float")
    coded = client.embeddings.create(model="small", input=TEXTS, encoding_format="base64")
    for number, packed in zip(floats.data, coded.data, strict=True):
        decoded = np.frombuffer(base64.b64decode(str(packed.embedding)), "<f4")
        np.testing.assert_allclose(decoded, number.embedding, atol=1e-7)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_fewer_dimensions_are_the_first_ones_at_length_one(
    encoding: Any, client: openai.OpenAI, local_url: str, predictor: Predictor
) -> None:
    body = {"input": TEXTS, "dimensions": 8, "encoding_format": encoding}
    data = call(f"{local_url}/v1/embeddings", body).body["data"]
    found = [item["embedding"] for item in data]
    if encoding == "base64":
        found = [np.frombuffer(base64.b64decode(item), "<f4") for item in found]
    cut = predictor.embed(TEXTS)[:, :8]
    expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    reply = client.embeddings.create(model="small", input=TEXTS, dimensions=8)
    np.testing.assert_allclose(vectors(reply), expected, atol=1e-6)


def test_bad_input_raises_what_openai_raises(client: openai.OpenAI) -> None:
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ("", {}, "text 1"),
        (["good", " "], {}, "text 2"),
        ([], {}, "input: send at least one"),
        ([1, 2, 3], {}, "token ids"),
        ("good", {"dimensions": 33}, "32"),
        ("good", {"dimensions": 0}, "dimensions"),
        ("good", {"encoding_format": "hex"}, "encoding_format"),
    ]
    for texts, options, names in refused:
        with pytest.raises(openai.UnprocessableEntityError, match=names):
            client.embeddings.create(model="small", input=texts, **options)
    with pytest.raises(openai.NotFoundError):
        client.models.list()


def test_a_long_text_needs_truncate(client: openai.OpenAI, predictor: Predictor) -> None:
    with pytest.raises(openai.APIStatusError, match="truncate: true") as refused:
        client.embeddings.create(model="small", input=LONG)
    assert refused.value.status_code == 413
    reply = client.embeddings.create(model="small", input=LONG, extra_body={"truncate": True})
    np.testing.assert_allclose(vectors(reply), predictor.embed([LONG]), atol=1e-6)


def test_keys_are_those_of_the_client(artifact: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("right\n", encoding="utf-8")
    with local_server(artifact, runtime="torch-fp32", keys_file=str(keys)) as (url, _):
        for key, accepted in (("right", True), ("wrong", False)):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                if accepted:
                    assert client.embeddings.create(model="small", input="a").data
                    continue
                with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
                    client.embeddings.create(model="small", input="a")
        assert call(f"{url}/v1/predict", {"inputs": "a"}).status == 401
        assert call(f"{url}/v1/predict", {"inputs": "a"}, key="right").status == 200


class Held:
    """A head that answers once it is released."""

    def __init__(self) -> None:
        self.asked, self.released = threading.Event(), threading.Event()
        self.head = LocalHead()

    async def __call__(self, head: StoredHead, features: Features, all_tags: bool) -> Output:
        self.asked.set()
        while not self.released.is_set():
            await asyncio.sleep(0.005)
        return await self.head(head, features, all_tags)


def test_overload_is_a_rate_limit_that_retries_outlive(artifact: Path) -> None:
    held = Held()
    limits: dict[str, Any] = {"max_waiting": 2, "runtime": "torch-fp32"}
    with (
        local_server(artifact, lambda _: held, **limits) as (url, service),
        ThreadPoolExecutor(1) as thread,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        busy = thread.submit(call, f"{url}/v1/predict", {"inputs": ["a", "b"], "tasks": ["topic"]})
        assert held.asked.wait(10)
        for texts in ("one", ["one"]):
            with pytest.raises(openai.RateLimitError) as refused:
                client.embeddings.create(model="small", input=texts)
            assert refused.value.response.headers["retry-after"] == "1"
        assert metric(url, "mtl_rejected_total") == 2
        timer = threading.Timer(0.2, held.released.set)
        timer.start()
        patient = client.with_options(max_retries=3)
        assert patient.embeddings.create(model="small", input="one").data
        assert busy.result().status == 200
        assert service.batcher.unanswered == 0
