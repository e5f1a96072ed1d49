"""Peer (d): sentence-transformers' trainer on the sentence task alone.

Its documentation's loss for sentences with a class: triplets of a batch (BatchAllTripletLoss).
"""

from __future__ import annotations

import argparse
import tempfile

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    model = SentenceTransformer(options.encoder, device="cpu")
    texts = [model.tokenizer.decode(row["input_ids"][1:-1]) for row in rows_of(options.rows)]
    intents = [row["intent"] for row in rows_of(options.rows)]
    loss = Counted(losses.BatchAllTripletLoss(model))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=32,
        num_train_epochs=1000,
        use_cpu=True,
        bf16=options.bf16,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"sentence": texts, "label": intents}),
        loss=loss,
        callbacks=[Paced(options.steps, loss)],  # type: ignore[arg-type]
    )
    trainer.train()


if __name__ == "__main__":
    main()
