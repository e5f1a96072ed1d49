"""Spans survive the way to sub-word tags and back, for every kind of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mtl_core.config import SourceConfig, TaskConfig
from mtl_core.data.encoding import (
    IGNORE,
    EncodedSplit,
    encode_split,
    resolve_labels,
    token_offsets,
)
from mtl_core.data.examples import Corpus, Example, Span
from mtl_core.data.tags import tag_names
from mtl_core.encoder import load_tokenizer
from mtl_core.errors import DataError
from mtl_core.metrics import tagged_spans, word_tags

ARCHITECTURES = ("bert", "distilbert", "roberta", "deberta-v2", "mpnet")
TYPES = ("loc", "per")
NER = {"ner": TaskConfig(kind="token_classification")}
NER_LABELS = {"ner": TYPES}


@pytest.fixture(scope="module")
def tokenizers(tiny_encoders: dict[str, Path]) -> dict[str, Any]:
    return {name: load_tokenizer(str(folder)) for name, folder in tiny_encoders.items()}


class Words:
    """A text made of words, some of which are marked: (word, label or "", begins anew)."""

    def __init__(self, parts: list[tuple[str, str, bool]]) -> None:
        self.words: list[tuple[int, int]] = []
        self.spans: list[Span] = []
        text, running = "", ""
        for word, label, anew in parts:
            text += " " if text else ""
            start, end = len(text), len(text) + len(word)
            self.words.append((start, end))
            if label and label == running and not anew:
                self.spans[-1] = self.spans[-1]._replace(end=end)
            elif label:
                self.spans.append(Span(start, end, label))
            running = label
            text += word
        self.text = text
        self.example = Example(text, {"ner": tuple(self.spans)}, tuple(self.words))


latin = st.text("abzMEi-.'é1", min_size=1, max_size=7)
marked = st.text("aeo", min_size=1, max_size=3).flatmap(
    lambda s: st.sampled_from([s + "\u0301", s + "\u0308x", "C" + s + "\u0327\u0301"])
)
emoji = st.sampled_from(["🙂", "👍🏽", "❤️", "👩‍🚀", "🚀🚀", "a🙂b", "🇵🇹"])
wide = st.text("東京日本語は한국", min_size=1, max_size=4)
other = st.text("Приветмяß", min_size=1, max_size=5) | st.sampled_from(["हिन्दी", "عربي", "ไทย"])
word = st.one_of(latin, marked, emoji, wide, other)
sentences = st.lists(
    st.tuples(word, st.sampled_from(["", "loc", "per"]), st.booleans()), min_size=1, max_size=8
).map(Words)


def encode(tokenizer: Any, *examples: Example, max_length: int = 512) -> EncodedSplit:
    return encode_split(examples, NER, NER_LABELS, tokenizer, max_length)


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(sentence=Words([("cafe\u0301", "loc", True), ("is", "", True)]))
@example(sentence=Words([("🙂", "per", True), ("❤️", "per", True)]))
@example(sentence=Words([("東京", "loc", True), ("日本", "loc", True), ("語", "loc", False)]))
@given(sentence=sentences)
def test_spans_come_back_from_the_tags_of_sub_words(
    tokenizers: dict[str, Any], name: str, sentence: Words
) -> None:
    tokenizer = tokenizers[name]
    split = encode(tokenizer, sentence.example)
    raw = tokenizer(sentence.text, return_offsets_mapping=True)["offset_mapping"]
    ranges = token_offsets(sentence.text, raw)
    tags = split.targets["ner"]
    real = np.flatnonzero(tags != IGNORE)
    assert [int(p) for p in real] == [p for p, (start, end) in enumerate(ranges) if start < end]
    decoded = [
        Span(ranges[real[first]][0], ranges[real[end - 1]][1], TYPES[kind])
        for kind, first, end in tagged_spans(tags[real], len(TYPES))
    ]
    assert decoded == sentence.spans
    # The same through words: what their first sub-words say is what the words were given.
    on_words = word_tags(np.where(tags == IGNORE, 0, tags), split.word_tokens, len(TYPES))
    assert np.array_equal(on_words, split.word_tags["ner"])
    assert split.num_truncated == 0


def names(tags: Any, types: tuple[str, ...] = TYPES) -> list[str]:
    return ["-" if tag == IGNORE else tag_names(types)[tag] for tag in tags]


def test_a_known_sentence_is_encoded_as_expected(minilm: str) -> None:
    tokenizer = load_tokenizer(minilm)
    text = "Unaffable Zoë flew to New York ."
    words = ((0, 9), (10, 13), (14, 18), (19, 21), (22, 25), (26, 30), (31, 32))
    spans = (Span(0, 13, "per"), Span(22, 30, "loc"))
    split = encode(tokenizer, Example(text, {"ner": spans}, words))
    pieces = tokenizer.convert_ids_to_tokens(split.input_ids.tolist())
    assert pieces == (
        [
            "[CLS]",
            "una",
            "##ffa",
            "##ble",
            "zoe",
            "flew",
            "to",
            "new",
            "york",
            ".",
            "[SEP]",
        ]  # BERT's own vocabulary
    )
    assert names(split.targets["ner"]) == (
        ["-", "B-per", "I-per", "I-per", "I-per", "O", "O", "B-loc", "I-loc", "O", "-"]
    )
    assert split.word_tokens.tolist() == [1, 4, 5, 6, 7, 8, 9]
    assert names(split.word_tags["ner"]) == ["B-per", "I-per", "O", "O", "B-loc", "I-loc", "O"]


def test_a_word_without_a_space_before_it_is_seen_at_the_first_piece_that_begins_in_it(
    minilm: str,
) -> None:
    text = "in L.aJoseph"  # l . aj ##ose ##ph
    spans = (Span(3, 6, "loc"), Span(6, 12, "per"))
    split = encode(load_tokenizer(minilm), Example(text, {"ner": spans}, ((0, 2), (3, 6), (6, 12))))
    assert split.word_tokens.tolist() == [1, 2, 5]
    assert names(split.targets["ner"]) == [
        "-",
        "O",
        *["B-loc", "I-loc", "I-loc"],
        "B-per",
        "I-per",
        "-",
    ]
    # Two words in one piece share it.
    split = encode(load_tokenizer(minilm), Example("new", {"ner": ()}, ((0, 1), (1, 3))))
    assert split.word_tokens.tolist() == [1, 1]


def test_ranges_follow_one_another_and_never_overlap() -> None:
    # The bytes of 🙂, a piece that crosses from one character into the next, a counted-in space.
    assert token_offsets("🙂東京 x", [(0, 0), (0, 1), (0, 1), (1, 2), (1, 3), (2, 3), (3, 5)]) == [
        (0, 0),
        (0, 1),
        (1, 1),
        (1, 2),
        (2, 3),
        (3, 3),
        (4, 5),
    ]
    # Dropped accents and joiners belong to the piece before; other letters do not.
    assert token_offsets("cafe\u0301 a\u200b\u200db x", [(0, 4), (6, 7), (9, 10)]) == [
        (0, 5),
        (6, 9),
        (9, 10),
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_truncation_loses_is_counted_and_marked(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    long = Words([("Berlin", "loc", False)] * 20).example
    short = Words([("Maria", "per", True)]).example
    split = encode(tokenizer, long, short, max_length=12)
    assert split.num_truncated == 1
    assert split.lengths.max() == 12
    words = split.word_tokens[split.word_starts[0] : split.word_starts[1]]
    kept = int((words >= 0).sum())
    assert 0 < kept < 20
    assert (words[kept:] == -1).all()
    assert (words[:kept] < 12).all()
    # The gold tags of lost words stay: they count as missed.
    assert names(split.word_tags["ner"][:20]) == ["B-loc"] + ["I-loc"] * 19


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("text", ["a b \u200b", "cafe\u0301", "❤️", "a\u200b", "a b  \n"])
def test_text_that_ends_in_what_no_piece_shows_is_not_cut(
    tokenizers: dict[str, Any], name: str, text: str
) -> None:
    assert encode(tokenizers[name], Example(text, {"ner": ()})).num_truncated == 0


TASKS = {
    "intent": TaskConfig(kind="classification"),
    "topics": TaskConfig(kind="multilabel"),
    "ner": TaskConfig(kind="token_classification"),
}
LABELS = {"intent": ("ask", "tell"), "topics": ("x", "y", "z"), "ner": TYPES}
ROWS = [
    Example("Maria sang", {"intent": "tell", "topics": ("z", "x")}),
    Example("in Berlin", {"ner": (Span(3, 9, "loc"),), "topics": ()}, ((0, 2), (3, 9))),
    Example("hello", {"intent": "ask", "ner": ()}, ((0, 5),)),
]


def test_each_kind_of_target_stands_where_the_row_has_it(tokenizers: dict[str, Any]) -> None:
    split = encode_split(ROWS, TASKS, LABELS, tokenizers["bert"], 32)
    assert len(split) == 3
    assert split.targets["intent"].tolist() == [1, IGNORE, 0]
    assert split.targets["topics"].tolist() == [[1, 0, 1], [0, 0, 0], [IGNORE] * 3]
    assert split.present["intent"].tolist() == [True, False, True]
    assert split.present["topics"].tolist() == [True, True, False]
    assert split.present["ner"].tolist() == [False, True, True]
    first, second, third = np.split(split.targets["ner"], split.starts[1:-1])
    assert set(names(first)) == {"-"}
    assert {"B-loc", "O", "-"} <= set(names(second))
    assert set(names(third)) == {"O", "-"}
    assert names(split.word_tags["ner"]) == ["O", "B-loc", "O"]
    assert split.label_counts("intent").tolist() == [1, 0, 1]
    real = [int((row != IGNORE).sum()) for row in (first, second, third)]
    assert split.label_counts("ner").tolist() == real
    assert split.output_counts("intent", 2).tolist() == [1, 1]
    assert split.output_counts("topics", 3).tolist() == [1, 0, 1]
    assert (
        split.output_counts("ner", 5).tolist()
        == np.bincount(split.targets["ner"][split.targets["ner"] != IGNORE], minlength=5).tolist()
    )


def corpus(train: list[Example], validation: list[Example], **declared: Any) -> Corpus:
    return Corpus({"train": train, "validation": validation}, declared, {})


def test_labels_are_read_from_train_in_order_of_the_alphabet() -> None:
    assert resolve_labels(corpus(ROWS, []), TASKS) == {
        "intent": ("ask", "tell"),
        "topics": ("x", "z"),
        "ner": ("loc",),
    }


def test_configured_labels_go_before_declared_and_declared_before_found_ones() -> None:
    tasks = {"intent": TASKS["intent"]}
    declared = corpus(ROWS, [], intent=("tell", "ask", "shout"))
    assert resolve_labels(declared, tasks)["intent"] == ("tell", "ask", "shout")
    beside = corpus(ROWS, [], intent=("tell",))
    assert resolve_labels(beside, tasks)["intent"] == ("tell", "ask")
    fixed = {"intent": TaskConfig(kind="classification", labels=("tell", "ask"))}
    assert resolve_labels(declared, fixed)["intent"] == ("tell", "ask")


@pytest.mark.parametrize(
    ("row", "label", "task"),
    [
        (Example("so loud", {"intent": "shout"}), "shout", "intent"),
        (Example("so loud", {"topics": ("x", "noise")}), "noise", "topics"),
        (Example("so loud", {"ner": (Span(3, 7, "vol"),)}), "vol", "ner"),
    ],
)
def test_a_label_that_train_never_has_is_an_error_that_names_it(
    row: Example, label: str, task: str
) -> None:
    with pytest.raises(DataError) as error:
        resolve_labels(corpus(ROWS, [row]), TASKS)
    message = str(error.value)
    assert message.startswith("validation:")
    for part in (repr(label), repr(task), "never occurs in train", "so loud", f"{task}.labels"):
        assert part in message


def test_a_label_that_is_not_configured_is_an_error_also_in_train() -> None:
    tasks = {"intent": TaskConfig(kind="classification", labels=("ask",))}
    with pytest.raises(DataError, match=r"train: label 'tell' of task 'intent'"):
        resolve_labels(corpus(ROWS, []), tasks)


def test_a_task_without_labels_in_train_is_an_error() -> None:
    with pytest.raises(DataError, match="task 'ner' has no label in train"):
        resolve_labels(corpus(ROWS[:1], ROWS[1:]), TASKS)


def test_snips_words_and_tags_come_through_unchanged(mtl_data: Path, minilm: str) -> None:
    from mtl_core.data.sources import read_corpus

    path = mtl_data / "snips" / "validation.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    source = SourceConfig(
        path=str(path.parent),
        columns={"text": "text", "words": "tokens", "slots": "tags", "intent": "label"},
    )
    tasks = {
        "slots": TaskConfig(kind="token_classification"),
        "intent": TaskConfig(kind="classification"),
    }
    corpus = read_corpus([source], tasks, 0)
    labels = resolve_labels(corpus, tasks)
    split = encode_split(corpus.splits["validation"], tasks, labels, load_tokenizer(minilm), 128)
    assert len(split) == len(rows) == 700
    assert split.num_truncated == 0
    for row, expected in enumerate(rows):
        words = slice(split.word_starts[row], split.word_starts[row + 1])
        tokens = slice(split.starts[row], split.starts[row + 1])
        assert names(split.word_tags["slots"][words], labels["slots"]) == expected["tags"]
        assert labels["intent"][split.targets["intent"][row]] == expected["label"]
        tags = np.maximum(split.targets["slots"][tokens], 0)
        seen = word_tags(tags, split.word_tokens[words], len(labels["slots"]))
        assert names(seen, labels["slots"]) == expected["tags"]
