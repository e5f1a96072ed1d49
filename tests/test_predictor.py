"""Text in, answers out: the same for a text alone, in company, reloaded and as scored."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_core import metrics
from mtl_core.answers import Features, Prediction, run_head
from mtl_core.build import build_train_state
from mtl_core.data.encoding import encode_split
from mtl_core.data.examples import Example, Span
from mtl_core.data.tags import spans_to_tags, tag_names
from mtl_core.errors import TextError
from mtl_core.evaluation import evaluate
from mtl_core.model import MultiTaskModel
from mtl_core.predictor import Predictor
from mtl_core.windows import Tokenized
from tests.small_runs import LABELS, data, example, experiment, learned, write_artifact

NUM_LAYERS = 3
ENCODERS = ["bert", "distilbert", "roberta", "deberta-v2", "mpnet"]
MIXED = [
    "Maria Lopez had the food at the table in São Paulo wonderful",
    "Zoë",
    "日本語 東京 は とても 楽しい 町 です",
    "👍🏽🙂 cafe\u0301 naïve re\u0301sume\u0301 \u200f שלום עולם مرحبا",
    "had a new phone in Grand Hotel cold in two hours, " * 2,
    "  leading and trailing space\t\n",
    "[SEP] </s> <s>",
    "\u200b",
]


def scattered(folder: Path, **changes: Any) -> Predictor:
    """An untrained model whose heads are so loud that its answers are many and sure."""
    config = experiment(folder, **changes)
    model = build_train_state(config, data(config)).model
    torch.manual_seed(1)
    for _, head in model.head_items:
        torch.nn.init.normal_(head.output.weight, std=3.0)
    return Predictor(model)


@pytest.fixture(scope="module")
def expert(tiny_encoders: dict[str, Path]) -> Predictor:
    """A model with a window of 32 tokens that knows 32 texts by heart."""
    state, _, _ = learned(tiny_encoders["bert"])
    state.model.encoder.max_length = 32
    return Predictor(state.model)


def assert_same(left: dict[str, Prediction], right: dict[str, Prediction]) -> None:
    """Labels and places are equal, probabilities to 1e-5."""
    for task in ("topic", "mood"):
        mine: Any = left[task]
        other: Any = right[task]
        assert mine.get("label") == other.get("label")
        assert mine.get("labels") == other.get("labels")
        assert mine["scores"] == pytest.approx(other["scores"], abs=1e-5)
    entities: Any = zip(left["entities"], right["entities"], strict=True)
    for one, same in entities:
        assert one["score"] == pytest.approx(same["score"], abs=1e-5)
        assert {**one, "score": 0} == {**same, "score": 0}


# The same answers


@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_is_answered_alone_as_in_a_mixed_batch_and_after_reloading(
    name: str, tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    predictor = scattered(tiny_encoders[name])
    together = predictor.predict(MIXED)
    assert sum(len(answer["entities"]) for answer in together) > 5
    for text, answer in zip(MIXED, together, strict=True):
        assert_same(predictor.predict([text])[0], answer)
    config = experiment(tiny_encoders[name])
    reloaded = Predictor.load(write_artifact(predictor.model, config, tmp_path / "artifact"))
    for again, answer in zip(reloaded.predict(MIXED), together, strict=True):
        assert_same(again, answer)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("decoding", ["viterbi", "greedy"])
def test_what_is_scored_is_what_is_answered(
    decoding: str, name: str, tiny_encoders: dict[str, Path]
) -> None:
    changes: dict[str, Any] = {"tasks": {"decoding": decoding}, "encoder": {"max_length": 64}}
    config = experiment(tiny_encoders[name], **changes)
    odd = [odd_example(text) for text in MIXED if len(text) < 80]
    texts = [example(number, set(LABELS)) for number in range(25)] + odd
    predictor = scattered(tiny_encoders[name], **changes)
    split = encode_split(texts, config.tasks, LABELS, predictor.tokenizer, 64)
    assert split.num_truncated == 0
    scored = evaluate(predictor.model, split)
    answers: list[dict[str, Any]] = predictor.predict([item.text for item in texts])

    right = [
        a["topic"]["label"] == item.targets["topic"] for a, item in zip(answers, texts, strict=True)
    ]
    assert 0 < sum(right) < len(texts)
    assert scored.scores()["topic"]["accuracy"] == np.mean(right)

    exact = [
        set(a["mood"]["labels"]) == set(item.targets["mood"])
        for a, item in zip(answers, texts, strict=True)
    ]
    assert scored.scores()["mood"]["exact_match"] == pytest.approx(np.mean(exact))

    index = {tag: number for number, tag in enumerate(tag_names(LABELS["entities"]))}
    counts = metrics.empty_counts("token_classification", len(LABELS["entities"]))
    for item, answer in zip(texts, answers, strict=True):
        tags = [
            np.array([index[tag] for tag in spans_to_tags(item.words, spans)])
            for spans in (
                [span for span in item.targets["entities"] if isinstance(span, Span)],
                [Span(e["start"], e["end"], e["entity_group"]) for e in answer["entities"]],
            )
        ]
        metrics.count_entities(counts, *tags)
    assert counts[:-1, 1].sum() > 20
    np.testing.assert_array_equal(scored.counts["entities"], counts)


def odd_example(text: str) -> Example:
    """A text whose words are what stands between spaces, the first two of them a person."""
    words, position = [], 0
    for word in text.split():
        start = text.index(word, position)
        position = start + len(word)
        words.append((start, position))
    person = Span(words[0][0], words[min(1, len(words) - 1)][1], "person")
    targets = {"topic": "food", "mood": ("good",), "entities": (person,)}
    return Example(text, targets, tuple(words))


# Entities


@pytest.mark.parametrize("name", ENCODERS)
def test_an_entity_is_a_piece_of_the_text_as_given(
    name: str, tiny_encoders: dict[str, Path]
) -> None:
    answers: list[dict[str, Any]] = scattered(tiny_encoders[name]).predict(MIXED)
    found = [(text, e) for text, a in zip(MIXED, answers, strict=True) for e in a["entities"]]
    assert {text for text, _ in found} >= set(MIXED[2:4])
    for text, entity in found:
        assert text[entity["start"] : entity["end"]] == entity["word"]
        assert entity["word"].strip()
        assert entity["entity_group"] in LABELS["entities"]
        assert 0 <= entity["score"] <= 1


def test_a_name_is_found_with_its_marks(expert: Predictor) -> None:
    text = "Maria Lopez had the song on a playlist in Sa\u0303o Paulo cold"
    (answer,) = expert.predict([text], ["entities"])
    entities: Any = answer["entities"]
    assert [e["word"] for e in entities] == ["Maria Lopez", "Sa\u0303o Paulo"]
    (answer,) = expert.predict(
        ["Maria Zoe\u0308 had the song on a playlist in Berlin"], ["entities"]
    )
    entities = answer["entities"]
    assert entities[0]["word"] == "Maria Zoe\u0308"


def test_entities_of_a_long_text_are_those_of_its_sentences(
    tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    folder = without_context(tiny_encoders["bert"], tmp_path / "encoder")
    state, _, _ = learned(folder, freeze={"encoder": True}, tasks={"hidden_size": 64})
    state.model.encoder.max_length = 32
    predictor = Predictor(state.model)
    sentences = [example(number, {"topic"}).text + " had the song" for number in range(12)]
    alone: list[Any] = predictor.predict(sentences, ["entities"])
    assert sum(len(answer["entities"]) for answer in alone) > 12
    text = " ".join(sentences)
    (item,) = predictor.tokenize([text])
    assert len(item.windows) > 6
    expected, shift = [], 0
    for sentence, answer in zip(sentences, alone, strict=True):
        expected += [(e["word"], e["start"] + shift) for e in answer["entities"]]
        shift += len(sentence) + 1
    found: Any = predictor.predict([text], ["entities"])[0]["entities"]
    assert [(e["word"], e["start"]) for e in found] == expected


@pytest.mark.parametrize("name", ENCODERS)
def test_where_windows_are_cut_changes_no_entity(
    name: str, tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    folder = without_context(tiny_encoders[name], tmp_path / "encoder")
    model = scattered(folder).model
    text = " ".join(MIXED * 3)
    answers: list[Any] = []
    for limit in (48, 32, 19, 8):
        model.encoder.max_length = limit
        answers.append(Predictor(model).predict([text], ["entities"])[0]["entities"])
    assert len(answers[0]) > 20
    for other in answers[1:]:
        assert [{**e, "score": 0} for e in other] == [{**e, "score": 0} for e in answers[0]]
        assert [e["score"] for e in other] == pytest.approx(
            [e["score"] for e in answers[0]], abs=1e-5
        )


def without_context(encoder: Path, folder: Path) -> Path:
    """The encoder with neither attention nor positions: a sub-word's state is its own alone."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(encoder)
    mixing = ("attention.output.dense", "attention.out_lin", "attn.o.", "position_embeddings")
    zeroed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in mixing):
                parameter.zero_()
                zeroed += 1
    assert zeroed >= 2 * NUM_LAYERS
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("limit", [8, 12, 32])
def test_windows_hold_every_sub_word_of_a_text(
    limit: int, name: str, tiny_encoders: dict[str, Path]
) -> None:
    predictor = scattered(tiny_encoders[name], encoder={"max_length": limit})
    tokenizer = predictor.tokenizer
    for text, item in zip(MIXED, predictor.tokenize(MIXED), strict=True):
        assert all(len(window) <= limit for window in item.windows)
        numbered: dict[int, int] = {}
        for window, numbers in zip(item.windows, item.numbers, strict=True):
            for token, number in zip(window, numbers, strict=True):
                assert numbered.setdefault(number, token) == token or number == -1
        numbered.pop(-1)
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [numbered[number] for number in sorted(numbered)] == expected
        assert sorted(numbered) == list(range(len(expected)))


def test_overlapping_windows_give_each_sub_word_where_it_has_most_context() -> None:
    item = Tokenized(
        "abcd",
        [[0, 1, 2, 3, 0], [0, 2, 3, 4, 0]],
        [[-1, 0, 1, 2, -1], [-1, 1, 2, 3, -1]],
        [(0, 1), (1, 2), (2, 3), (3, 4)],
    )
    offsets, windows, places = item.placed
    assert offsets == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert windows.tolist() == [0, 0, 1, 1]
    assert places.tolist() == [1, 2, 2, 3]


def test_sub_words_that_stand_for_no_text_have_no_tag() -> None:
    item = Tokenized("🙂 a", [[7, 1, 2, 3]], [[-1, 0, 1, 2]], [(0, 1), (1, 1), (2, 3)])
    offsets, _, places = item.placed
    assert places.tolist() == [1, 3]
    assert offsets == [(0, 1), (2, 3)]


# Labels and vectors


def test_a_long_text_is_labelled_by_its_beginning(expert: Predictor) -> None:
    start = example(1, {"topic"}).text
    ids = expert.tokenizer(start, add_special_tokens=False)["input_ids"]
    beginning = start + " the" * (30 - len(ids))
    one, other = expert.predict([beginning + " a phone" * 50, beginning], ["topic", "mood"])
    assert_same({**one, "entities": []}, {**other, "entities": []})


def test_probabilities_belong_to_the_labels(expert: Predictor) -> None:
    text = example(3, {"topic"}).text
    (answer,) = expert.predict([text])
    topic: Any = answer["topic"]
    assert list(topic["scores"]) == list(LABELS["topic"])
    assert sum(topic["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert topic["score"] == max(topic["scores"].values()) == topic["scores"][topic["label"]]
    mood: Any = answer["mood"]
    assert mood["labels"] == [name for name, p in mood["scores"].items() if p >= 0.5]


def test_a_label_is_given_from_its_threshold_on(expert: Predictor) -> None:
    head = expert.model.head("mood")
    features = Features(np.zeros((1, 32), np.float32), np.zeros((0, 32)), np.zeros(1, np.int64))
    kept = [parameter.detach().clone() for parameter in head.parameters()]
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.bias.copy_(torch.tensor([-1e-6, 0.0, 1.0]))
    output: Any = run_head(head, features)
    with torch.no_grad():
        for parameter, values in zip(head.parameters(), kept, strict=True):
            parameter.copy_(values)
    (answer,) = output.predictions(expert.tokenize(["a text"]))
    assert answer["scores"]["good"] == 0.5  # rounded, but less
    assert answer["labels"] == ["bad", "late"]


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_have_unit_length_and_do_not_depend_on_company(
    name: str, tiny_encoders: dict[str, Path]
) -> None:
    predictor = scattered(tiny_encoders[name])
    vectors = predictor.embed(MIXED)
    assert vectors.shape == (len(MIXED), 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for text, vector in zip(MIXED, vectors, strict=True):
        np.testing.assert_allclose(predictor.embed([text])[0], vector, atol=1e-5)
    cosines = predictor.similarity(MIXED)
    np.testing.assert_allclose(cosines, vectors @ vectors.T, atol=1e-6)
    assert np.abs(cosines).max() <= 1


def test_vectors_of_the_bundled_model_are_those_of_sentence_transformers(minilm: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from mtl_core.encoder import resolve_model

    theirs = sentence_transformers.SentenceTransformer(resolve_model(minilm), device="cpu")
    config = experiment(minilm, encoder={"max_length": 128})
    predictor = Predictor(MultiTaskModel(build_train_state(config, data(config)).model.encoder, {}))
    np.testing.assert_allclose(predictor.embed(MIXED), theirs.encode(MIXED), atol=1e-5)


# How much it runs


def test_a_text_is_encoded_once_whatever_the_number_of_tasks(expert: Predictor) -> None:
    texts = [example(number, {"topic"}).text for number in range(9)]
    rows = []
    expert.model.encoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for tasks in (None, ["topic"], ["entities"], ["topic", "mood", "entities"]):
        rows.clear()
        answers = expert.predict(texts, tasks)
        assert sum(rows) == len(texts)
        assert list(answers[0]) == (tasks or list(LABELS))


def test_a_long_text_costs_sentence_tasks_one_window(expert: Predictor) -> None:
    rows = []
    expert.model.encoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    text = "the food " * 200
    expert.predict([text], ["topic", "mood"])
    assert rows == [1]
    rows.clear()
    expert.predict([text], ["topic", "entities"])
    assert sum(rows) == len(expert.tokenize([text])[0].windows)


def test_batches_are_bounded_by_tokens(expert: Predictor) -> None:
    shapes: list[Any] = []
    expert.model.encoder.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    expert.predict(["the food " * 9] * 500 + ["Zoë"] * 500, ["topic"])
    assert len(shapes) > 1
    assert all(rows * width <= expert.stage.batch_tokens for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == 1000


@pytest.mark.parametrize("piece", ["a", "Maria Lopez ", "日", "🙂", "x."])
def test_a_text_of_100_000_characters_takes_seconds(piece: str, expert: Predictor) -> None:
    text = (piece * 100_000)[:100_000]
    started = time.perf_counter()
    (answer,) = expert.predict([text])
    assert time.perf_counter() - started < 10
    entities: Any = answer["entities"]
    assert all(text[e["start"] : e["end"]] == e["word"] for e in entities)


def test_one_entity_over_a_whole_book_takes_seconds(expert: Predictor) -> None:
    text = "Maria Lopez " * 8_000
    head = expert.model.head("entities")
    kept = head.output.bias.detach().clone()
    with torch.no_grad():
        head.output.bias[3] += 1000.0  # I-person everywhere
    started = time.perf_counter()
    (answer,) = expert.predict([text], ["entities"])
    with torch.no_grad():
        head.output.bias.copy_(kept)
    assert time.perf_counter() - started < 10
    entities: Any = answer["entities"]
    assert [e["word"] for e in entities] == [text.rstrip()]


# What is refused


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u3000", None, 3])
def test_a_blank_text_is_refused_with_its_number(blank: Any, expert: Predictor) -> None:
    for call in (expert.predict, expert.embed, expert.similarity, expert.tokenize):
        with pytest.raises(TextError, match="text 2 is empty or only spaces"):
            call(["fine", blank, "fine"])  # type: ignore[operator]


def test_half_a_character_is_refused_with_the_text_s_number(expert: Predictor) -> None:
    with pytest.raises(TextError, match="text 2 is no valid Unicode"):
        expert.predict(["fine", "half \ud83d"])


def test_an_unknown_task_is_a_key_error(expert: Predictor) -> None:
    with pytest.raises(KeyError, match="weather"):
        expert.predict(["fine"], ["topic", "weather"])


def test_no_texts_have_no_answers(expert: Predictor) -> None:
    assert expert.predict([]) == []
    assert expert.embed([]).shape == (0, 32)
    assert expert.similarity([]).shape == (0, 0)
