"""Peer (c): flair's MultitaskModel, fine-tuned: a classifier and a tagger on one embedding.

Each task has a corpus of its own, so a sentence, which here has both labels, goes through the
encoder once for each.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from typing import Any

import flair
import peers
from flair.data import Corpus, Sentence
from flair.datasets import FlairDatapointDataset
from flair.embeddings import TransformerWordEmbeddings
from flair.models import SequenceTagger, TextClassifier
from flair.nn.multitask import make_multitask_model_and_corpus
from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import TrainerPlugin
from pace import Pace
from peers import IGNORE, rows_of
from transformers import AutoTokenizer


class Paced(TrainerPlugin):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.pace: Pace | None = None

    @TrainerPlugin.hook
    def before_training_batch(self, **_: Any) -> None:
        self.pace = self.pace or Pace(self.steps)

    @TrainerPlugin.hook
    def after_training_batch(self, batch: list[Any], **_: Any) -> None:
        assert self.pace is not None
        self.pace.step(sum(sentence.get_metadata("tokens") for sentence in batch))


def words_of(pieces: list[str], tags: list[int]) -> Iterator[tuple[str, int]]:
    """A WordPiece tokenizer's pieces as words, each with the tag of its first piece."""
    word, tag = "", IGNORE
    for piece, own in zip(pieces, tags, strict=True):
        if piece.startswith("##"):
            word += piece[2:]
            continue
        if word:
            yield word, tag
        word, tag = piece, own
    yield word, tag


def main() -> None:
    parser = peers.options(__doc__)
    parser.add_argument("--intents", type=int, required=True)
    parser.add_argument("--tags", type=int, required=True)
    options = parser.parse_args()
    logging.getLogger("flair").setLevel(logging.ERROR)
    flair.device = "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    tagged, classified = [], []
    for row in rows_of(options.rows):
        pieces = tokenizer.convert_ids_to_tokens(row["input_ids"][1:-1])
        words = list(words_of(pieces, row["labels"][1:-1]))
        for kind in (tagged, classified):
            sentence = Sentence([word for word, _ in words])
            sentence.add_metadata("tokens", len(row["input_ids"]))
            kind.append(sentence)
        classified[-1].add_label("intent", f"intent {row['intent']}")
        for token, (_, tag) in zip(tagged[-1], words, strict=True):
            token.add_label("slot", f"tag {tag}")
    embedding = TransformerWordEmbeddings(
        options.encoder,
        layers="-1",
        fine_tune=True,
        is_document_embedding=True,
        cls_pooling="mean",
    )
    corpora = [
        Corpus(FlairDatapointDataset(found), sample_missing_splits=False)
        for found in (tagged, classified)
    ]
    tagger = SequenceTagger(
        embeddings=embedding,
        tag_dictionary=corpora[0].make_label_dictionary("slot", add_unk=False),
        tag_type="slot",
        use_crf=False,
        use_rnn=False,
        reproject_embeddings=False,
    )
    classifier = TextClassifier(
        embedding,
        label_type="intent",
        label_dictionary=corpora[1].make_label_dictionary("intent", add_unk=False),
    )
    model, corpus = make_multitask_model_and_corpus(
        [(tagger, corpora[0]), (classifier, corpora[1])]
    )
    ModelTrainer(model, corpus).fine_tune(
        tempfile.mkdtemp(),
        learning_rate=2e-4,
        mini_batch_size=32,
        max_epochs=1000,
        plugins=[Paced(options.steps)],
    )


if __name__ == "__main__":
    main()
