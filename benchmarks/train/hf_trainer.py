"""Peer (a): transformers' Trainer with a two-headed model and the collator for token labels.

Its documentation's way to several tasks in one model: the model computes the sum of their losses.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
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
    set_seed,
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


class Scored(TrainerCallback):
    """Writes what the model predicts for other rows after each epoch, and the seconds trained."""

    def __init__(self, model: TwoHeads, pad_id: int, rows: dict[str, str], folder: str) -> None:
        self.model, self.pad_id, self.folder = model, pad_id, folder
        self.rows = {name: rows_of(path) for name, path in rows.items()}
        self.seconds, self.epoch = 0.0, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.since = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self.since
        self.epoch += 1
        for name, rows in self.rows.items():
            found = self.model.predict(rows, self.pad_id)
            np.savez(f"{self.folder}/{name}-{self.epoch}.npz", **found)
        print(json.dumps({"epoch": self.epoch, "seconds": self.seconds}), flush=True)
        self.since = time.perf_counter()


def main() -> None:
    parser = peers.options(__doc__)
    parser.add_argument("--epochs", type=int, help="train so many, and predict after each")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--predict", nargs="+", help="rows to predict for, and last a folder")
    parser.add_argument("--intents", type=int, required=True)
    parser.add_argument("--tags", type=int, required=True)
    parser.add_argument("--frozen", default="nothing", help="nothing, a number of layers, encoder")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--by-length", action="store_true")
    options = parser.parse_args()
    set_seed(options.seed)
    model = TwoHeads(options.encoder, options.intents, options.tags, options.frozen)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    by_length: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    arguments = TrainingArguments(
        learning_rate=2e-4,
        seed=options.seed,
        **peers.training_settings(options.bf16, options.epochs or 1000),
        **(by_length if options.by_length else {}),
    )
    callback: TrainerCallback = Paced(options.steps, model)
    if options.epochs:
        *paths, folder = options.predict
        rows = {Path(path).stem: path for path in paths}
        callback = Scored(model, int(tokenizer.pad_token_id), rows, folder)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows_of(options.rows)),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        callbacks=[callback],
    )
    trainer.train()


if __name__ == "__main__":
    main()
