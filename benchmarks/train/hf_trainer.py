"""Peer (a): transformers' Trainer with a two-headed model and the collator for token labels.

Its documentation's way to several tasks in one model: the model computes the sum of their losses.
"""

from __future__ import annotations

from typing import Any

import peers
from datasets import Dataset
from pace import Pace
from peers import TwoHeads, rows_of
from transformers import (
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Paced(TrainerCallback):
    def __init__(self, steps: int, model: TwoHeads) -> None:
        self.steps, self.model, self.seen = steps, model, 0
        self.pace: Pace | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.pace = Pace(self.steps)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.pace is not None
        tokens, self.seen = self.model.tokens - self.seen, self.model.tokens
        self.pace.step(tokens)


def main() -> None:
    parser = peers.options(__doc__)
    parser.add_argument("--intents", type=int, required=True)
    parser.add_argument("--tags", type=int, required=True)
    parser.add_argument("--frozen", default="nothing", help="nothing, a number of layers, encoder")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--by-length", action="store_true")
    options = parser.parse_args()
    model = TwoHeads(options.encoder, options.intents, options.tags, options.frozen)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    by_length: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    arguments = TrainingArguments(
        learning_rate=2e-4,
        **peers.training_settings(options.bf16),
        **(by_length if options.by_length else {}),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows_of(options.rows)),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        callbacks=[Paced(options.steps, model)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
