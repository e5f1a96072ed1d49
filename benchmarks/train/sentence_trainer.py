"""Peer (d): sentence-transformers' trainer on the sentence task alone.

Its documentation's loss for sentences with a class: triplets of a batch (BatchAllTripletLoss).
"""

from __future__ import annotations

import peers
import torch
from datasets import Dataset
from hf_trainer import Paced
from peers import rows_of
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses
from sentence_transformers.training_args import SentenceTransformerTrainingArguments
from torch import nn


class Counted(nn.Module):
    """A loss that counts the real tokens that went into it."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss, self.tokens = loss, 0

    def forward(self, features: list[dict[str, torch.Tensor]], labels: torch.Tensor) -> object:
        self.tokens += sum(int(feature["attention_mask"].sum()) for feature in features)
        return self.loss(features, labels)


def main() -> None:
    parser = peers.options(__doc__)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    model = SentenceTransformer(options.encoder, device="cpu")
    rows = rows_of(options.rows)
    texts = [model.tokenizer.decode(row["input_ids"][1:-1]) for row in rows]
    intents = [row["intent"] for row in rows]
    loss = Counted(losses.BatchAllTripletLoss(model))
    settings = peers.training_settings(options.bf16)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**settings),
        train_dataset=Dataset.from_dict({"sentence": texts, "label": intents}),
        loss=loss,
        callbacks=[Paced(options.steps, loss)],  # type: ignore[arg-type]
    )
    trainer.train()


if __name__ == "__main__":
    main()
