"""`InferenceClient` against /tasks and /embed, with transformers' own pipeline as the oracle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TokenClassificationPipeline,
)

from mtl_core.answers import run_head
from mtl_core.artifact import load_model
from mtl_core.data.tags import tag_names
from mtl_core.predictor import Predictor
from tests.conftest import SENTENCES
from tests.servers import call, local_server
from tests.small_runs import LABELS, example, experiment, learned, write_artifact

pytestmark = pytest.mark.slow

STRATEGIES = ["none", "simple", "first", "average", "max"]
TEXTS = [example(number, set(LABELS)).text for number in [*range(20), *range(500, 560)]] + [
    "Zoë met Maria Lopez, Zoë-Maria and nobody else in Berlin.Lisbon (São Paulo)!",
    "Grand Hotel Grand Hotel Berlin Berlin",
    "naïve résumé 🙂 in 日本 東京, Maria",
]


@pytest.fixture(autouse=True)
def _clients_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are offline, which huggingface_hub takes to include this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


class Served(NamedTuple):
    url: str
    artifact: Path
    predictor: Predictor
    comparable: list[str]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def served(
    request: pytest.FixtureRequest,
    tiny_encoders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """A model with WordPiece and one with byte-level BPE."""
    encoder = tiny_encoders[request.param]
    state, _, _ = learned(encoder, training={"epochs": 30, "batch_size": 8})
    folder = tmp_path_factory.mktemp("served") / "artifact"
    write_artifact(state.model, experiment(encoder), folder)
    with local_server(folder, runtime="torch-fp32") as (url, _):
        predictor = Predictor.load(folder)
        yield Served(url, folder, predictor, comparable(predictor))


def oracle(folder: Path, strategy: str) -> TokenClassificationPipeline:
    """The artifact's encoder and head as a model of transformers' own."""
    names = tag_names(LABELS["entities"])
    encoder = AutoModel.from_pretrained(folder / "encoder")
    encoder.config.id2label = dict(enumerate(names))
    encoder.config.label2id = {name: number for number, name in enumerate(names)}
    model = AutoModelForTokenClassification.from_config(encoder.config).eval()
    weights = {k: v for k, v in encoder.state_dict().items() if not k.startswith("pooler.")}
    getattr(model, model.base_model_prefix).load_state_dict(weights)
    head = load_model(folder).head("entities")
    model.classifier.load_state_dict(head.output.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    return TokenClassificationPipeline(
        model=model, tokenizer=tokenizer, aggregation_strategy=strategy
    )


def comparable(predictor: Predictor) -> list[str]:
    """Texts on which our answers have no reason to differ from transformers'.

    The likeliest tags are a legal sequence, so that decoding changes none; and every sub-word has
    characters of its own (byte-level BPE splits characters and stands some pieces for none).
    """
    head = predictor.model.head("entities")
    words = sorted({word for text in (*TEXTS, *SENTENCES) for word in text.split()})
    whole = [word for word in words if plain(predictor, f"in {word}")]
    draw = random.Random(2)
    mixed = [" ".join(draw.choices(whole, k=draw.randint(3, 9))) for _ in range(400)]
    kept = []
    for text in filter(partial(plain, predictor), [*reversed(TEXTS), *mixed]):
        (item,) = predictor.tokenize([text])
        output: Any = run_head(head, predictor.stage.encode([item], [True]), all_tags=True)
        if (output.tags == output.scores.argmax(axis=1)).all():
            kept.append(text)
    return kept[:40]


def plain(predictor: Predictor, text: str) -> bool:
    """Whether every sub-word has characters of its own."""
    (item,) = predictor.tokenize([text])
    return item.ranges == item.placed[0]


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_entities_are_those_of_transformers_pipeline(strategy: Any, served: Served) -> None:
    pipeline = oracle(served.artifact, strategy)
    client = InferenceClient(model=f"{served.url}/tasks/entities")
    texts = served.comparable
    assert len(texts) > 30
    total = 0
    for text, ignored in product(texts, (None, [])):
        expected: Any = pipeline(text, ignore_labels=ignored)
        found = client.token_classification(
            text, aggregation_strategy=strategy, ignore_labels=ignored
        )
        name = "entity" if strategy == "none" else "entity_group"
        assert [(e[name], e.start, e.end) for e in found] == [
            (e[name], e["start"], e["end"]) for e in expected
        ], text
        assert [e.score for e in found] == pytest.approx([e["score"] for e in expected], abs=1e-5)
        if strategy == "none":
            body = pipeline_body(text, strategy, ignore_labels=ignored)
            raw = call(f"{served.url}/tasks/entities", body).body
            assert [(e["index"], e["word"]) for e in raw] == [
                (e["index"], e["word"]) for e in expected
            ]
        else:
            assert [e.word for e in found] == [text[e["start"] : e["end"]] for e in expected]
        total += ignored is None and len(found)
    assert total > len(texts) / 2


def pipeline_body(text: Any, strategy: str, **more: Any) -> dict[str, Any]:
    return {"inputs": text, "parameters": {"aggregation_strategy": strategy, **more}}


def test_simple_is_the_default_and_what_predict_says(served: Served) -> None:
    url = f"{served.url}/tasks/entities"
    for text in TEXTS:
        expected: Any = served.predictor.predict([text], ["entities"])[0]["entities"]
        found = InferenceClient(model=url).token_classification(text)
        assert [(e.entity_group, e.word, e.start, e.end) for e in found] == [
            (e["entity_group"], e["word"], e["start"], e["end"]) for e in expected
        ]
    listed = call(url, {"inputs": TEXTS[:3]}).body
    assert listed == [call(url, {"inputs": text}).body for text in TEXTS[:3]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ignored_labels_are_left_out(strategy: Any, served: Served) -> None:
    client = InferenceClient(model=f"{served.url}/tasks/entities")
    text = "Maria Lopez had the food at the table in Berlin"
    kinds = LABELS["entities"]
    name = "entity" if strategy == "none" else "entity_group"
    every = client.token_classification(text, aggregation_strategy=strategy, ignore_labels=[])
    ignored = [f"{mark}-{kinds[0]}" for mark in "BI"] if strategy == "none" else [kinds[0]]
    kept = client.token_classification(text, aggregation_strategy=strategy, ignore_labels=ignored)
    assert kept == [e for e in every if e[name] not in ignored]
    assert 0 < len(kept) < len(every)
    assert "O" in [e[name] for e in kept]  # as with transformers, the list stands for its default


@pytest.mark.parametrize("text", ["\u200b", "\u00ad", "\ufeff", "\u0000"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_text_of_which_no_sub_word_is_left_has_no_entities(
    strategy: str, text: str, served: Served
) -> None:
    url = f"{served.url}/tasks/entities"
    alone = call(url, pipeline_body(TEXTS[0], strategy, ignore_labels=[])).body
    answer = call(url, pipeline_body([TEXTS[0], text], strategy, ignore_labels=[]))
    assert answer.status == 200
    (before, found) = answer.body
    assert [(e["start"], e["end"]) for e in before] == [(e["start"], e["end"]) for e in alone]
    (item,) = served.predictor.tokenize([text])
    assert bool(found) == bool(item.placed[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_entity_of_a_long_text_is_lost(strategy: str, served: Served) -> None:
    text = " ".join(TEXTS[:12])
    assert len(served.predictor.tokenize([text])[0].windows) > 4
    answer = call(f"{served.url}/tasks/entities", pipeline_body(text, strategy))
    assert answer.status == 200
    assert answer.body[-1]["end"] > 0.9 * len(text)
    if strategy == "simple":
        offline: Any = served.predictor.predict([text], ["entities"])[0]["entities"]
        # Windows may have shared their batches otherwise, which rounds otherwise.
        assert [e.pop("score") for e in answer.body] == pytest.approx(
            [e.pop("score") for e in offline], abs=1e-5
        )
        assert answer.body == offline


def test_labels_come_the_likeliest_first(local_url: str, predictor: Predictor) -> None:
    client = InferenceClient(model=f"{local_url}/tasks/topic")
    for text in TEXTS[:5]:
        topic: Any = predictor.predict([text], ["topic"])[0]["topic"]
        expected = sorted(topic["scores"].items(), key=lambda item: -item[1])
        found = client.text_classification(text)
        assert [(e.label, e.score) for e in found] == expected
        assert client.text_classification(text, top_k=2) == found[:2]
        assert client.text_classification(text, function_to_apply="softmax") == found
    moods = InferenceClient(model=f"{local_url}/tasks/mood").text_classification(TEXTS[0])
    scores: Any = predictor.predict([TEXTS[0]], ["mood"])[0]["mood"]
    assert {e.label: e.score for e in moods} == scores["scores"]


def test_probabilities_are_torchs(artifact: Path, local_url: str) -> None:
    model = load_model(artifact).eval()
    tokenizer = AutoTokenizer.from_pretrained(artifact / "encoder")
    head = model.head("topic")

    encoded = tokenizer(TEXTS[:8], padding=True, return_tensors="pt")
    with torch.inference_mode():
        _, pooled = model.encoder(encoded["input_ids"], encoded["attention_mask"])
        logits = head(pooled)
    shown = InferenceClient(model=f"{local_url}/tasks/topic")
    for text, row in zip(TEXTS[:8], torch.softmax(logits, -1), strict=True):
        expected = dict(zip(LABELS["topic"], row.tolist(), strict=True))
        found = {e.label: e.score for e in shown.text_classification(text)}
        assert found == pytest.approx(expected, abs=1e-5)


def test_features_are_vectors(local_url: str, predictor: Predictor) -> None:
    client = InferenceClient(model=f"{local_url}/embed")
    found = client.feature_extraction(TEXTS[0])
    np.testing.assert_allclose(found, predictor.embed([TEXTS[0]]), atol=1e-6)
    raw = client.feature_extraction(TEXTS[0], normalize=False)
    assert not np.allclose(np.linalg.norm(raw), 1)
    np.testing.assert_allclose(raw / np.linalg.norm(raw), found, atol=1e-6)
    for option in ({"truncation_direction": "left"}, {"prompt_name": "query"}):
        with pytest.raises(HfHubHTTPError) as refused:
            client.feature_extraction(TEXTS[0], **option)
        assert refused.value.response.status_code == 422
        assert next(iter(option)) in refused.value.response.json()["error"]
    long = " ".join(TEXTS[:12])
    with pytest.raises(HfHubHTTPError) as refused:
        client.feature_extraction(long)
    assert refused.value.response.status_code == 413
    cut = client.feature_extraction(long, truncate=True)
    np.testing.assert_allclose(cut, predictor.embed([long]), atol=1e-6)


def test_what_cannot_be_had_is_refused(local_url: str) -> None:
    with pytest.raises(HfHubHTTPError) as unknown:
        InferenceClient(model=f"{local_url}/tasks/nothing").text_classification("a")
    assert unknown.value.response.status_code == 404
    assert "topic, mood, entities" in unknown.value.response.json()["error"]
    url = f"{local_url}/tasks/topic"
    for parameters in (
        {"function_to_apply": "sigmoid"},
        {"function_to_apply": "none"},
        {"top_k": 0},
        {"aggregation_strategy": "best"},
    ):
        answer = call(url, {"inputs": "a", "parameters": parameters})
        assert answer.status == 422
        assert next(iter(parameters)) in answer.body["error"]
    long = " ".join(TEXTS[:12])
    refused = call(url, {"inputs": long})
    assert refused.status == 413
    assert "send parameters.truncation: true" in refused.body["error"]
    assert call(url, {"inputs": long, "parameters": {"truncation": True}}).status == 200
